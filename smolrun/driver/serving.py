"""One server on the driver: HTTP, the ranks behind it, and the messages between them.

    with ServingRun(config, say, progress) as run:    model found, port bound, hosts connected
        outcome = run.serve(folder)                   blocks until stopped, or until a rank is lost

Only wiring: the model's cut is in serving_start.py, requests are in serving/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from smolrun.config import RunConfig, are_replicas, ranks
from smolrun.config.models import PRETRAINED_NAMES, DecoderConfig
from smolrun.config.plan import addresses
from smolrun.config.settings import ServingConfig
from smolrun.config.suggest import problem
from smolrun.driver.engine_bridge import EngineBridge
from smolrun.driver.fleet import is_elsewhere, open_fleet
from smolrun.driver.lan import lan_names
from smolrun.driver.preflight import emulated, start_notes
from smolrun.driver.run_on_ranks import run_on_ranks
from smolrun.driver.run_summary import not_equipped
from smolrun.driver.serving_follow import check_follow, rolling_reload
from smolrun.driver.serving_hosts import ServingHosts, Unloading
from smolrun.driver.serving_model import find_model, notes
from smolrun.driver.serving_parts import PartsDelivery, parts_folder
from smolrun.driver.serving_replicas import ReplicaLoader
from smolrun.driver.serving_start import ModelLoader, ServingSpec, VocabularySender
from smolrun.errors import ConfigError, HostError, HostErrors, SmolrunError
from smolrun.estimate.serving_plan import (
    DoesNotFit,
    ServingPlan,
    ServingRank,
    first_that_fits,
    weights_line,
)
from smolrun.events import Event, Note
from smolrun.launch.driver import Subscriber
from smolrun.launch.machine_memory import gb, machine_memory
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.mesh.addresses import is_loopback
from smolrun.models.huggingface_folder import GENERATION_FILE, read_generation_config
from smolrun.models.sampling import Sampling
from smolrun.models.shape import completed_shape
from smolrun.serving.access import AccessPolicy
from smolrun.serving.conversations import history_folder
from smolrun.serving.frontend import Frontend
from smolrun.serving.generation import Service
from smolrun.serving.http_server import HttpServer
from smolrun.serving.messages import Ready, ServingDtype
from smolrun.serving.weight_types import GROUP_SIZE, weight_options
from smolrun.tracking.api_key import LAN, api_key, api_key_file
from smolrun.tracking.run_folder import RunFolder

Progress = Callable[[str, int, int], None]
_PROCESS_BYTES = 300e6  # of a rank, before it has a model
_ANY_S = 1e-3  # where every rank is equally fast
_COMES_BACK_S = 60.0  # within which a lost rank is mostly back; copies for others would be in vain
_STOP_S = 30.0  # for the ranks to end, once no answer runs any more


def serving_config(config: RunConfig) -> RunConfig:
    """The configuration with the ranks that serving needs: one where the model is not to be cut.

    A machine that holds the model gains nothing from two processes, so auto has one on it. What
    follows a run is a replica, also where it is alone; ConfigError for what cannot."""
    cluster, serving, mode = config.cluster, config.serving, config.serving.mode
    update: dict[str, Any] = {}
    if serving.follow:
        check_follow(config)
        mode = "local" if mode == "auto" else mode
        serving = serving.model_copy(update={"mode": "replicas"})
    if cluster.hosts is None and mode not in ("pipeline", "replicas"):
        update = {"ranks": 1}
    elif cluster.hosts is not None and mode == "local":
        update = {"hosts": [cluster.hosts[0].model_copy(update={"ranks": 1})]}
    cluster = cluster.model_copy(update=update)
    return config.model_copy(update={"task": "serve", "serving": serving, "cluster": cluster})


def dry_run(config: RunConfig, progress: Progress) -> int:
    """Print what a server would need; of a shape whose weights are on the hub without them."""
    from smolrun.estimate.serving_dry_run import report  # torch: seconds

    config = serving_config(config)
    model = config.model
    dtype: ServingDtype = "bf16"  # as all that are on the hub by these names
    group_size = GROUP_SIZE
    if isinstance(model, DecoderConfig) and model.vocab_size is not None:
        name, vocab_size = PRETRAINED_NAMES[model.name], model.vocab_size
        keys = model.keywords()
        shape = completed_shape(**{key: keys[key] for key in keys if key != "vocab_size"})
    else:
        source = find_model(config, progress, lambda _: None)
        name, shape, vocab_size = source.name, source.shape, source.vocab_size
        dtype, group_size = source.dtype, source.group_size
    models = weight_options(config.serving.weights, dtype, shape, vocab_size, group_size)
    return report(config, name, shape, models, group_size)


class ServingRun:
    """A server from its port to its end. `url` is where it listens."""

    def __init__(self, config: RunConfig, say: Callable[[str], None], progress: Progress) -> None:
        """Find the model, bind the port, connect to the hosts. ConfigError, HostError: nothing was
        started."""
        self._config = config = serving_config(config)
        self._say = say
        self._progress = progress
        self._closing = contextlib.ExitStack()
        self.emulated = emulated(config)
        self.bind = bind = config.serving.bind
        self.is_open = bind != "localhost" and not is_loopback(bind)  # beyond this machine
        self.lan = lan_names() if bind == LAN else None
        self.source = source = find_model(config, progress, say)
        sizes = (source.shape, source.vocab_size, source.group_size)
        models = weight_options(config.serving.weights, source.dtype, *sizes)
        self.spec = ServingSpec(source, models)
        self.has_replicas = are_replicas(config)
        if self.has_replicas:  # alike, or an answer would change where it continues elsewhere
            self.spec = self.spec.only(0)
        self._check_memory()
        for line in notes(source, machine_memory().available):
            say(line)
        self._warned: set[str] = set()
        self.bridge = EngineBridge(config, say)
        self.server = self._http_server()
        self._closing.callback(self.server.stop, 0.0)
        try:
            self._fleet = open_fleet(config)
        except BaseException:
            self._closing.close()
            raise
        self._closing.callback(lambda: self._fleet.close())  # the one that is there then

    def cached_files(self) -> list[Path]:
        """What must stay on this machine as long as the server lives."""
        folders = (self.source.folder, self.source.tokenizer_folder)
        return [*(Path(one) for one in folders if one is not None), parts_folder()]

    def _check_memory(self) -> None:
        """ConfigError where the model does not fit on this machine alone; other hosts are asked
        once they run, before anything is loaded."""
        hosts = [rank.host for rank in ranks(self._config)]
        if is_elsewhere(self._config):
            return
        memory_gb = self._config.cluster.memory_gb
        room = memory_gb * 2**30 if memory_gb else machine_memory().room
        free = room / len(hosts) - _PROCESS_BYTES
        found = [ServingRank(host, _ANY_S, _ANY_S, free) for host in hosts]
        try:
            longest = self.source.shape.max_sequence_length
            first_that_fits(self._config, list(self.spec.models.values()), longest, found)
        except DoesNotFit as error:
            raise ConfigError(f"model={self.source.name} does not fit: {error}") from error
        except ValueError as error:
            raise ConfigError(f"serving.layers: {error}") from error

    def _http_server(self) -> HttpServer:
        from smolrun.serving.api import build_app
        from smolrun.serving.text import Prompts

        serving, source = self._config.serving, self.source
        assert source.tokenizer_folder is not None, "find_model has refused that"
        self._prompts = Prompts(Path(source.tokenizer_folder))
        service = Service(
            source.name,
            self._prompts,
            self.bridge.frontend,
            source.end_ids,
            defaults=sampling_defaults(serving, Path(source.folder)),
            default_max_tokens=1024 if serving.max_tokens == "auto" else serving.max_tokens,
            request_timeout_s=serving.request_timeout_s,
            history=self._history(),
            compare_with=serving.compare_with,
        )
        self._closing.callback(service.close)
        app = build_app(service, self._policy())
        host = "0.0.0.0" if self.lan else serving.bind  # noqa: S104  (the key is needed then)
        server = HttpServer(app, self.bridge.frontend, host=host, port=serving.port)
        try:
            self.url = self._reached_at(server.start())
        except OSError as error:
            allowed = "a port that no process uses, or 0 for any free one"
            what = error.strerror or str(error)
            line = problem("serving.port", serving.port, what, allowed=allowed)
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                line = problem("serving.bind", serving.bind, what)
            raise ConfigError(line) from error
        return server

    def _history(self) -> Path | None:
        if self._config.serving.history == "browser":
            return None
        self._say(f"conversations of the page are kept in {(folder := history_folder())}")
        return folder

    def _reached_at(self, url: str) -> str:
        """The URL of a server that listens on all addresses: by its name in the LAN, by the address
        that the cluster file gives this machine, else by its name."""
        serving = self._config.serving
        if self.lan is not None:
            return self.lan.urls(int(url.rpartition(":")[2]))[0]
        if serving.bind not in ("0.0.0.0", "::"):  # noqa: S104  (compared, not bound)
            return url
        hosts = self._config.cluster.hosts or []
        here = [addresses(host)[0] for host in hosts if host.is_here and host.address]
        name = here[0] if here else platform.node()
        host = f"[{name}]" if ":" in name else name
        return f"http://{host}:{url.rpartition(':')[2]}"

    def _policy(self) -> AccessPolicy:
        """Without a key only this machine may ask, by its own names; with one, a foreign page that
        gets here by another name cannot know the key."""
        serving = self._config.serving
        key = needed_key(self._say, is_terminal=sys.stdout.isatty()) if self.is_open else None
        any_host = ["*"] if self.is_open and self.lan is None else []
        return AccessPolicy(
            api_key=key,
            hosts=[*self.lan.hosts, *serving.allowed_hosts]
            if self.lan is not None
            else serving.allowed_hosts or any_host,
            own_address=self.lan is not None,
            origins=serving.cors_origins,
        )

    def __enter__(self) -> ServingRun:
        return self

    def __exit__(self, *raised: object) -> None:
        self._closing.close()

    def serve(
        self,
        folder: RunFolder,
        *,
        on_ready: Callable[[Ready], None],
    ) -> RunOutcome:
        """Start the ranks and serve until the user stops them or one is lost. `on_ready` is called
        on this thread once a token has flowed, for the first time."""
        config = self._config
        for line in start_notes(config):
            self._say(line)
        frontend = self.bridge.frontend
        unloading = Unloading(
            frontend, config.serving.unload_after_min, folder.stop_requests, self._say
        )
        hosts = ServingHosts(frontend, is_spread=is_elsewhere(config))

        def run(ready: Callable[[Ready], None]) -> RunOutcome:
            return self._on_ranks(folder, hosts, unloading, ready)

        def run_again(ready: Callable[[Ready], None]) -> RunOutcome:
            try:
                self._fleet = open_fleet(config)
                return run(ready)
            except (HostError, HostErrors) as error:
                return not_equipped(error)
            finally:
                self._fleet.close()

        with contextlib.closing(hosts), unloading.interrupts.installed():
            outcome = run(on_ready)
            self._fleet.close()
            while unloading.has_unloaded(outcome):
                outcome = unloading.load_again(run_again)
        if outcome.status == "stopped":
            return dataclasses.replace(outcome, reason="stopped by the user")
        if outcome.status == "failed":
            frontend.fail(f"the server ended: {outcome.reason}")
        return outcome

    def _on_ranks(
        self,
        folder: RunFolder,
        hosts: ServingHosts,
        unloading: Unloading,
        on_ready: Callable[[Ready], None],
    ) -> RunOutcome:
        """Start the ranks, load, and serve until they end."""
        config = self._config
        drain = Draining(self.server, self.bridge.frontend, config.serving.drain_s, self._say)
        drain.is_unloading = lambda: unloading.is_unloading
        delivery = PartsDelivery(
            config,
            self.source,
            self._fleet.machines,
            folder.run_id,
            is_busy=lambda: self.bridge.frontend.num_requests > 0,
            say=self._say,
            progress=self._progress,
        )
        loader = self._loader(delivery)
        roll = rolling_reload(config, self.source, folder.path, loader, self.bridge, self._say)

        def ready(news: Ready) -> None:
            on_ready(news)
            for one in roll:
                one.on_ready(news)
            if isinstance(loader, ModelLoader):
                self._prepare_for_losses(loader, delivery)

        self.bridge.on_ready = ready
        vocabulary = VocabularySender(self._prompts.token_bytes)
        others = [RankNotes(self._say), hosts, unloading, *roll]
        try:
            return run_on_ranks(
                config,
                folder,
                self._fleet,
                [vocabulary, loader, self.bridge, drain, *others],
                limits=Limits(
                    start_s=config.cluster.start_timeout_s,
                    finish_s=config.mesh.timeout_s,
                    stop_s=_STOP_S,
                ),
                say=self._say,
                progress=self._progress,
                stop_requests=unloading.num_stops,
            )
        except (HostError, HostErrors) as error:
            return not_equipped(error)

    def _loader(self, delivery: PartsDelivery) -> ModelLoader | ReplicaLoader:
        if are_replicas(self._config):
            return ReplicaLoader(
                self._config,
                self.spec,
                lambda host, source: delivery.whole(host, source, self.spec.dtype),
                progress=self._progress,
                say=self._say,
            )
        return ModelLoader(
            self._config,
            self.spec,
            lambda plan, is_wanted: delivery.bring(plan, self.spec.dtype, is_wanted),
            earlier=delivery.earlier_layers(),
            on_plan=self._show_plan,
            progress=self._progress,
        )

    def _prepare_for_losses(self, loader: ModelLoader, delivery: PartsDelivery) -> None:
        """Say whose loss the others cannot make good, and with serving.spare have each layer on
        the host that would take it over."""
        hosts, plans = [rank.host for rank in ranks(self._config)], loader.if_lost()
        for rank in [rank for rank, plan in plans.items() if plan is None]:
            text = f"without rank {rank} on {hosts[rank]} the model would not fit on the others"
            if text not in self._warned:
                self._warned.add(text)
                self._say(f"{text}: its loss would end all answers")
        made = [plan for plan in plans.values() if plan is not None]
        if made and self._config.serving.spare and self._fleet.machines:
            pause_s = 0.0 if loader.is_whole else _COMES_BACK_S
            threading.Thread(
                target=delivery.copy,
                args=(made, self.spec.dtype, pause_s, loader.while_unchanged()),
                name="smolrun-spare",
                daemon=True,
            ).start()

    def _show_plan(self, plan: ServingPlan, number: int) -> None:
        if len(self.spec.models) > 1:
            self._say(f"serving.weights=auto: {weights_line(self.spec.models, number)}")
        self.spec = self.spec.only(number)
        for left in plan.left_out:
            self._say(
                f"{left.host} left out: {left.with_it:.2g} tokens/s with it, {left.without:.2g} "
                "without; serving.hosts=all uses it"
            )
        if len(plan.stages) > 1:
            hosts = {rank.rank: rank.host for rank in ranks(self._config)}
            parts = [
                f"rank {rank} ({hosts[rank]}) layers {plan.layers[rank].start} to "
                f"{plan.layers[rank].stop - 1}, {gb(plan.weight_bytes(self.spec.sizes, rank))} of "
                f"weights and {gb(plan.cache_bytes(self.spec.sizes, rank))} of cache"
                for rank in plan.stages
            ]
            whole = gb(self.spec.sizes.weights)
            self._say(f"pipeline: {'; '.join(parts)}; the whole model has {whole} of weights")


class RankNotes(Subscriber):
    """Shows what the ranks note."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_event(self, event: Event) -> None:
        if isinstance(event, Note):
            whose = "" if event.rank is None else f" (rank {event.rank})"
            self._say(f"{event.level}: {event.message}{whose}")


class Draining(Subscriber):
    """Lets running answers end before the ranks are stopped."""

    def __init__(
        self, server: HttpServer, frontend: Frontend, drain_s: float, say: Callable[[str], None]
    ) -> None:
        # Whether no user has asked for the stop, and the server stays.
        self.is_unloading: Callable[[], bool] = lambda: False
        self._server = server
        self._frontend = frontend
        self._drain_s = drain_s
        self._say = say
        self._thread: threading.Thread | None = None

    def may_stop(self) -> bool:
        """Once no answer runs any more, or the time for that is over."""
        if self.is_unloading():
            return True
        if self._thread is None:
            # No answer comes of what waits for a model: loading it ends with the stop.
            drain_s = 0.0 if self._frontend.state == "loading" else self._drain_s
            if self._frontend.num_requests and drain_s:  # a length, read by another thread
                self._say(f"running answers get up to {drain_s:g} s to end; Ctrl-C again: at once")
            self._thread = threading.Thread(
                target=self._server.stop, args=(drain_s,), name="smolrun-drain", daemon=True
            )
            self._thread.start()
        return not self._thread.is_alive()


def sampling_defaults(serving: ServingConfig, folder: Path) -> Sampling:
    """How tokens are drawn where a request does not say: as configured, else as the model's
    generation_config.json says, else by temperature 0.7. ConfigError where that file is damaged."""
    own = read_generation_config(folder)
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {key: own.get(key) for key in keys if own.get("do_sample")}
    values = {key: value for key, value in given.items() if value is not None}
    values = {"temperature": 0.7} | values
    if serving.temperature != "auto":
        values["temperature"] = serving.temperature
    if serving.top_p != "auto":
        values["top_p"] = serving.top_p
    try:
        return msgspec.convert(values, Sampling)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder / GENERATION_FILE}: {error}") from error


def needed_key(say: Callable[[str], None], *, is_terminal: bool) -> str:
    """The key that every request beyond this machine needs; it is shown once, on a terminal: what
    is said elsewhere ends in a log. ConfigError if there can be none."""
    try:
        key, is_new = api_key()
    except SmolrunError as error:
        raise ConfigError(str(error)) from error
    if is_new and is_terminal:
        say(f"clients need this API key, shown only now and kept in {api_key_file()}: {key}")
    else:
        say(f"clients need the API key in {api_key_file()}")
    return key
