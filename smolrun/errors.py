"""Every error smolrun raises on purpose: what happened, to whom, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class SmolrunError(Exception):
    """Base of all errors that are shown as one sentence instead of a traceback."""


class ConfigError(SmolrunError):
    """The configuration is invalid; carries all problems at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(SmolrunError):
    """The data cannot be used: missing, empty, unreadable, or not as configured."""


class CheckpointError(SmolrunError):
    """A checkpoint is damaged, of another format, or missing."""


class ProtocolError(SmolrunError):
    """Received bytes violate the wire protocol; their connection must be closed."""


class HandshakeError(ProtocolError):
    """The peer of a new connection failed authentication, or has another protocol version."""


class EarlierGeneration(HandshakeError):
    """The peer of a new connection has not left an earlier generation of the mesh yet."""


BROKE_PROTOCOL = "it broke the protocol"  # how the reason of such a PeerLost begins


class PeerLost(SmolrunError):
    """A peer is lost: it died, hangs, is unreachable, or violated the protocol."""

    def __init__(
        self, rank: int, generation: int, reason: str, reported_by: int | None = None
    ) -> None:
        """`reported_by`: the rank that reported it, where this one did not detect it itself."""
        self.rank = rank
        self.reported_by = reported_by
        self.generation = generation
        self.reason = reason
        super().__init__(f"lost rank {rank}: {reason}")

    @property
    def broke_protocol(self) -> bool:
        """Whether the peer sent invalid data, and did not just end or stop responding."""
        return self.reason.startswith(BROKE_PROTOCOL)


class CollectiveMismatch(SmolrunError):
    """Two ranks run different operations where all must run the same one."""

    def __init__(self, ranks: tuple[int, int], operations: tuple[str, str], hint: str = "") -> None:
        """`operations` are what the two ranks run; `hint`: what to do."""
        self.ranks = ranks
        self.operations = operations
        self.hint = hint
        (one, other), (this, that) = ranks, operations
        what = f"rank {one} runs {this} where rank {other} runs {that}"
        super().__init__(what + f"; {hint or 'all ranks must run the same ones in one order'}")


class WaitTimeout(SmolrunError):
    """A wait passed its deadline although every peer is still alive.

    `rank` is the peer that was waited for, if it was one."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        self.rank = rank
        super().__init__(message)


class GenerationEnded(SmolrunError):
    """A later generation of the mesh was announced: the ranks of the run have changed."""


class MeshClosed(SmolrunError):
    """The mesh was closed while work was still pending."""


class HostError(SmolrunError):
    """A machine of the cluster cannot be used: which one, why, and what to do."""

    def __init__(self, host: str, what: str, hint: str | None = None) -> None:
        self.host = host
        self.what = what
        self.hint = hint
        super().__init__(f"{host}: {what}" + (f"; {hint}" if hint else ""))


class LoginFailed(HostError):
    """No SSH connection to a machine; `is_refused`: it answers, but accepts none of our keys."""

    def __init__(
        self, host: str, what: str, hint: str | None = None, *, is_refused: bool = False
    ) -> None:
        self.is_refused = is_refused
        super().__init__(host, what, hint)


class HostErrors(SmolrunError):
    """Several machines of the cluster cannot be used; one line each."""

    def __init__(self, errors: Sequence[SmolrunError]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in errors))


class TrainingError(SmolrunError):
    """Training cannot continue, for example because the loss is not finite."""


class NonFiniteLogits(SmolrunError):
    """A model computed NaN or infinite logits, from which no token can be drawn."""


class StopRequested(SmolrunError):
    """The user asked the run to stop before it could finish what it was doing."""
