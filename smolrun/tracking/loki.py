"""`tracker.loki`: the logs of a run in a Loki server, while it runs.

    logs/*.jsonl --read_logs--> batches of streams --POST /loki/api/v1/push--> Loki

The files are the buffer: a server that is down or slow costs neither memory nor time of the run,
and its lines are sent later. A thread of its own, "smolrun-loki", does all of it. A stream has the
labels run, rank, host and level; the times of its lines rise.

Source: Loki's HTTP API, "Push log entries to Loki"; RFC 7617 and 6750 for credentials.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import platformdirs

from smolrun.errors import SmolrunError
from smolrun.log_records import LogRecord
from smolrun.sanitize import one_line
from smolrun.tracking.api_key import read_key
from smolrun.tracking.logs import LogQuery, read_logs
from smolrun.tracking.run_folder import RunFolder

PATH = "/loki/api/v1/push"
LABELS = ("run", "rank", "host", "level")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BATCH_BYTES = 512 << 10  # Loki takes 4 MiB at once
_BATCH_S = 1.0  # the oldest line waits so long for others
_MOST_LINE_CHARS = 60_000  # a line of more than 256 KB is refused (max_line_size)
_REQUEST_S = 10.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0
_SHOWN_CHARS = 200  # of an error
_END_S = 10.0  # for what is left when the run has ended


class LokiStream(msgspec.Struct):
    """Lines with the same labels: [nanoseconds as text, line], oldest first."""

    stream: dict[str, str]
    values: list[tuple[str, str]]


class Batch:
    """Collects records as the body of one request."""

    def __init__(self, run: str) -> None:
        self._run = run[:200]
        self._streams: dict[tuple[str, ...], LokiStream] = {}
        self._latest_ns: dict[tuple[str, ...], int] = {}  # of a stream, over all batches
        self.num_lines = self.num_bytes = 0

    def add(self, record: LogRecord) -> None:
        """Append the record to its stream; equal times become 1 ns apart, which keeps the order."""
        rank = "driver" if record.rank is None else str(record.rank)
        values = (self._run, rank, one_line(record.host)[:200], record.level or "unknown")
        ns = (record.time - _EPOCH) // timedelta(microseconds=1) * 1000
        ns = self._latest_ns[values] = max(ns, self._latest_ns.get(values, -1) + 1)
        labels = dict(zip(LABELS, values, strict=True))
        stream = self._streams.setdefault(values, LokiStream(labels, []))
        text = f"{record.logger}: {record.message}" if record.logger else record.message
        stream.values.append((str(ns), text[:_MOST_LINE_CHARS]))
        self.num_lines += 1
        self.num_bytes += len(text) + 40

    def take(self) -> bytes:
        """The body of a request, as JSON; the batch is empty then."""
        body = msgspec.json.encode({"streams": list(self._streams.values())})
        self._streams = {}
        self.num_lines = self.num_bytes = 0
        return body


def credentials_file() -> Path:
    """Where the credentials for Loki are: `user:password`, or a token. It may be absent."""
    return platformdirs.user_config_path("smolrun") / "loki.key"


def authorization(url: str) -> tuple[httpx.Auth | None, dict[str, str]]:
    """How requests to `url` are authorized: basic, by a token, or not. SmolrunError where the file
    cannot be used, or its content would travel unencrypted."""
    path = credentials_file()
    if not path.exists():
        return None, {}
    try:
        key = read_key(path)
    except (OSError, ValueError) as error:
        raise SmolrunError(f"{path} cannot be read: {error}") from error
    if not is_private(url):
        raise SmolrunError(f"{path} is sent over https, or to this machine, only")
    user, colon, password = key.partition(":")
    if colon:
        return httpx.BasicAuth(user, password), {}
    return None, {"Authorization": f"Bearer {key}"}


def is_private(url: str) -> bool:
    """Whether nobody in the network can read what is sent there."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class PushReply:
    """What the server answered; code 0: nothing."""

    code: int
    text: str
    retry_after_s: float = 0.0

    @property
    def is_success(self) -> bool:
        """Whether it has the lines."""
        return 200 <= self.code < 300


class LokiShipper:
    """Sends the logs that a run writes from now on; `warn` gets few sentences, from any thread."""

    def __init__(
        self, folder: RunFolder, url: str, warn: Callable[[str], None], *, end_s: float = _END_S
    ) -> None:
        """Starts the thread. `url` is the server's, or that of its API."""
        self._folder = folder
        self._url = f"{url.rstrip('/').removesuffix(PATH)}{PATH}"
        self._warn = warn
        self._end_s = end_s
        self._began = datetime.now(UTC)
        self._ending = threading.Event()
        self._give_up_at = float("inf")
        self._has_warned = False
        self.num_sent = self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="smolrun-loki", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, for at most `end_s`; a sentence says what was not sent."""
        self._give_up_at = time.monotonic() + self._end_s
        self._ending.set()
        self._thread.join(self._end_s + 1.0)
        if self.num_dropped or self._thread.is_alive():
            total = self.num_sent + self.num_dropped
            what = f"Loki did not get {self.num_dropped:,} of {total:,} lines"
            self._warn(f"tracker.loki: {what}; logs/ of the run has them")

    def _run(self) -> None:
        try:
            auth, headers = authorization(self._url)
        except SmolrunError as error:
            self._warn(f"tracker.loki: {error}; Loki gets no credentials")
            auth, headers = None, {}
        try:
            with httpx.Client(auth=auth, headers=headers, timeout=_REQUEST_S) as client:
                self._ship(client)
        except Exception as error:  # no error of it ends the run
            self._warn(f"tracker.loki broke ({type(error).__name__}: {error})")

    def _ship(self, client: httpx.Client) -> None:
        query = LogQuery(since=self._began, follow=True)
        records = read_logs(
            self._folder, query, wait=self._ending.wait, may_end=self._ending.is_set
        )
        batch, due_at = Batch(self._folder.run_id), 0.0
        for record in records:
            if record is not None:
                if not batch.num_lines:
                    due_at = time.monotonic() + _BATCH_S
                batch.add(record)
            is_due = batch.num_lines and time.monotonic() >= due_at
            if batch.num_bytes >= _BATCH_BYTES or (record is None and is_due):
                self._push(client, batch)
        if batch.num_lines:
            self._push(client, batch)

    def _push(self, client: httpx.Client, batch: Batch) -> None:
        """Send it until the server takes or refuses it, or the run has ended for too long."""
        num_lines, pause_s = batch.num_lines, _FIRST_PAUSE_S
        body = gzip.compress(batch.take(), 1)
        while (left_s := self._give_up_at - time.monotonic()) > 0:
            answer = self._post(client, body, min(_REQUEST_S, left_s))
            if answer.is_success:
                self.num_sent += num_lines
                return
            what = f"answers {answer.code}: {answer.text}" if answer.code else answer.text
            is_lost = 0 < answer.code < 500 and answer.code != 429
            self._warn_once(f"{what}; its lines {'are not sent' if is_lost else 'wait in logs/'}")
            if is_lost:
                break
            self._pause(max(pause_s, answer.retry_after_s))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        self.num_dropped += num_lines

    def _post(self, client: httpx.Client, body: bytes, timeout_s: float) -> PushReply:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        try:
            with client.stream(
                "POST", self._url, content=body, headers=headers, timeout=timeout_s
            ) as answer:
                text = next(answer.iter_text(_SHOWN_CHARS), "") if answer.status_code != 204 else ""
                return PushReply(
                    answer.status_code,
                    one_line(text[:_SHOWN_CHARS]).strip(),
                    _retry_after_s(answer),
                )
        except httpx.HTTPError as error:
            return PushReply(0, f"does not answer ({str(error) or type(error).__name__})")

    def _pause(self, pause_s: float) -> None:
        """Until the next try; shorter once the run has ended."""
        if not self._ending.wait(pause_s):
            return
        left_s = self._give_up_at - time.monotonic()
        time.sleep(max(0.0, min(pause_s, _FIRST_PAUSE_S, left_s)))

    def _warn_once(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"tracker.loki: {self._url} {what}")


def _retry_after_s(answer: httpx.Response) -> float:
    """Of the header Retry-After in seconds, at most the longest pause; 0: it says nothing."""
    text = answer.headers.get("retry-after", "")
    return min(float(text), _LAST_PAUSE_S) if text.isascii() and text.isdigit() else 0.0
