"""Names that are planned but not built yet, so that asking for one is answered by name.

Every issue shortens it.
"""

from __future__ import annotations

CHOICES: dict[str, tuple[str, ...]] = {
    "task": (
        "serve",
        "generate",
        "chat",
        "compare",
        "logs",
    ),
    "algorithm": ("mp", "mp_pipeline", "ep", "diloco"),
    "model": ("moe",),
    "mesh": ("torch",),
    "mesh.kind": ("torch",),
    "serving": ("pipeline", "replicas"),
    "serving.mode": ("pipeline", "replicas"),
}  # fmt: skip  (one line a group reads better than one line a name)

ONLY: dict[str, object] = {}
"""Keys that accept one value until the rest is built."""
