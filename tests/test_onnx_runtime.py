"""An exported model scores and generates as PyTorch does, and refuses what it cannot do."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import SENTENCES, wordpiece
from fusion_model.export import OnnxFusionLM, export_model
from fusion_model.export.manifest import read_manifest
from fusion_model.export.runtime.generation import GenerationOptions, generate_rows, probabilities
from fusion_model.export.runtime.session import check_version, choose_device
from fusion_model.export.runtime.steps import Steps
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model
from test_cli import fails, run, unsealed
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fusion_model
from fusion_model import FUSIONS
from fusion_model.data.text import Document
from fusion_model.data.tokenizer import cut_vocabulary
from fusion_model.errors import ExportError, FusionLMError

TEXT = " ".join(SENTENCES[:8])
DOCUMENTS = [Document("one", SENTENCES[:4]), Document("two", SENTENCES[4:7])]


def pair(folder: Path, **options: Any) -> tuple[fusion_model.FusionLM, OnnxFusionLM]:
    """The model in PyTorch and exported."""
    export_model(str(folder), folder / "onnx", encoder=True, **options)
    return fusion_model.load(str(folder)), OnnxFusionLM(folder / "onnx", threads=1)


@pytest.fixture(scope="module")
def bert_pair(
    tmp_path_factory: pytest.TempPathFactory, bpe, bert_folder: Path
) -> tuple[fusion_model.FusionLM, OnnxFusionLM]:
    return pair(saved_model(tmp_path_factory.mktemp("bert"), bpe, bert_folder, fusion="concat"))


@pytest.fixture
def export(bert_pair, tmp_path: Path) -> Path:
    """A copy of an export, to be damaged."""
    return Path(shutil.copytree(bert_pair[1].folder, tmp_path / "export"))


def same_words(found: list, expected: list) -> None:
    for a, b in zip(found, expected, strict=True):
        key = ("document", "sentence", "word", "text", "tokens")
        assert [getattr(a, k) for k in key] == [getattr(b, k) for k in key]
        assert a.nats == pytest.approx(b.nats, abs=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_scores_and_text_equal_pytorchs(fusion: str, bpe, tmp_path: Path) -> None:
    torch_lm, onnx_lm = pair(saved_model(tmp_path, bpe, "counts", fusion=fusion))
    for options in ({}, {"context": "article"}, {"whitespace_correction": True}):
        same_words(onnx_lm.score(DOCUMENTS, **options), torch_lm.score(DOCUMENTS, **options))
    expected = torch_lm.perplexity(DOCUMENTS)
    found = onnx_lm.perplexity(DOCUMENTS)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert (found.tokens, found.words) == (expected.tokens, expected.words)
    for options in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}):
        options |= {"max_new_tokens": 9}
        assert onnx_lm.generate("The cat", **options) == torch_lm.generate("The cat", **options)


def test_with_a_pretrained_encoder(bert_pair) -> None:
    torch_lm, onnx_lm = bert_pair
    same_words(onnx_lm.score(TEXT), torch_lm.score(TEXT))
    options = {"max_new_tokens": 8, "num_beams": 2}
    assert onnx_lm.generate("", **options) == torch_lm.generate("", **options)


@pytest.mark.parametrize("view", ["previous", "masked"])
def test_cut_vocabulary_and_other_views(view: str, bert_folder: Path, tmp_path: Path) -> None:
    tokenizer = cut_vocabulary(wordpiece(), SENTENCES, 80)
    options = {"fusion": "add", "pooling": "static", "view": view, "shares_vocabulary": True}
    if view == "masked":
        options |= {"pooling": "mean", "shares_vocabulary": False}
    torch_lm, onnx_lm = pair(saved_model(tmp_path, tokenizer, bert_folder, **options))
    same_words(onnx_lm.score(DOCUMENTS), torch_lm.score(DOCUMENTS))
    if view == "masked":
        with pytest.raises(FusionLMError, match="sees the future"):
            onnx_lm.generate("The cat")
    else:
        assert onnx_lm.generate("the cat") == torch_lm.generate("the cat", max_new_tokens=20)


@pytest.mark.parametrize("fusion", ["concat", "input", "init_cell"])
def test_several_prompts_run_together_as_they_do_alone(fusion: str, bpe, tmp_path: Path) -> None:
    _, lm = pair(saved_model(tmp_path, bpe, "counts", fusion=fusion))
    prompts = ["The cat", "", "She said that the dog", "A cat"]
    alone = [lm.generate(p, max_new_tokens=7)[0] for p in prompts]
    assert lm.generate(prompts, max_new_tokens=7) == alone
    vector = np.ones(12, dtype=np.float32)
    given = [lm.generate(p, max_new_tokens=7, prefix_embeds=vector)[0] for p in prompts]
    assert lm.generate(prompts, max_new_tokens=7, prefix_embeds=vector) == given


def test_rows_end_at_eos_and_the_others_go_on(bert_pair) -> None:
    _, lm = bert_pair
    prompts = [lm.prompt_row(p) for p in ("The cat", "She said", "Nobody sat", "A")]
    options, generator = GenerationOptions(max_new_tokens=12), np.random.default_rng(0)

    def rows(eos: int | None) -> list[list[int]]:
        return generate_rows(lm.steps(None), prompts, options, eos, generator)

    whole = rows(None)
    assert [len(row) for row in whole] == [len(p) + 12 for p in prompts]
    stop = whole[0][len(prompts[0]) + 2]
    expected = []
    for prompt, row in zip(prompts, whole, strict=True):
        made = row[len(prompt) :]
        expected.append(prompt + (made[: made.index(stop) + 1] if stop in made else made))
    ended = rows(stop)
    assert ended == expected
    assert len(ended[0]) < len(whole[0])
    assert len({len(row) - len(p) for row, p in zip(ended, prompts, strict=True)}) > 1


def test_one_vector_a_sequence_scores_as_in_pytorch(bert_pair) -> None:
    torch_lm, lm = bert_pair
    ids = np.array([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])
    lengths, e = np.array([5, 3]), np.random.default_rng(0).standard_normal((2, 32), np.float32)
    found = lm.token_log_probs(ids, e, lengths)
    with torch.inference_mode():
        expected = torch_lm.model.token_log_probs(*map(torch.from_numpy, (ids, e, lengths)))
    assert found.shape == (6,)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"top_k": 5}, {"top_p": 0.7, "top_k": 0}, {"temperature": 0.5, "top_k": 9, "top_p": 0.8}],
)
def test_samples_come_from_transformers_distribution(options: dict[str, Any]) -> None:
    scores = torch.randn(1, 40) * 2
    warped = TemperatureLogitsWarper(options.get("temperature", 1.0))(None, scores)
    if options.get("top_k"):
        warped = TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = TopPLogitsWarper(options["top_p"])(None, warped)
    expected = warped.softmax(dim=-1)[0].numpy()
    found = probabilities(scores[0].double().numpy(), GenerationOptions(**options))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_seed_repeats_a_sample(bert_pair) -> None:
    _, lm = bert_pair
    options = {"do_sample": True, "max_new_tokens": 10, "num_return_sequences": 4}
    first = lm.generate("The", seed=1, **options)
    assert lm.generate("The", seed=1, **options) == first
    assert lm.generate("The", seed=2, **options) != first
    assert len(set(first)) > 1


def test_the_state_stays_where_it_is(bert_pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lm = bert_pair
    lm.generate("The cat", max_new_tokens=1)
    placed, seen = [], []
    place, go = Steps._placed, Steps._run

    def run_and_watch(self, rows, new, state, order, fresh):
        out = go(self, rows, new, state, order, fresh)
        seen.append((state, out[1]))
        return out

    monkeypatch.setattr(Steps, "_placed", lambda s, *a: placed.append(1) or place(s, *a))
    monkeypatch.setattr(Steps, "_run", run_and_watch)
    lm.generate("The cat", max_new_tokens=6)
    assert len(placed) == 1  # the zeros before the prompt
    assert len(seen) == 6
    for (_, out), (given, _) in pairwise(seen):
        assert given is out  # the very values that the step before gave
        assert all(isinstance(value, onnxruntime.OrtValue) for value in out)


def test_generation_options_are_held_to(bert_pair) -> None:
    _, lm = bert_pair
    for options, message in (
        ({"repetition_penalty": 2.0}, "no generation option 'repetition_penalty'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"do_sample": True, "num_beams": 2}, "does not sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"num_return_sequences": 2}, "needs do_sample"),
        ({"prefix_embeds": np.zeros(7)}, r"shape \[7\]: expected \[32\]"),
        ({"num_beams": 2, "streamer": object()}, "one prompt and no beams"),
    ):
        with pytest.raises(FusionLMError, match=message):
            lm.generate("The cat", **options)


def test_inputs_of_the_wrong_width_are_refused_by_name(bert_pair) -> None:
    _, lm = bert_pair
    ids, e = np.array([[1, 5, 9]]), np.zeros((1, 2, 32), np.float32)
    assert lm.token_log_probs(ids, e).shape == (2,)
    for bad_ids, bad_e, message in (
        (ids, e[..., :31], r"prefix_embeds has shape \[1, 2, 31\]: expected \[1, 2, 32\]"),
        (ids, e[:, :1], r"prefix_embeds has shape \[1, 1, 32\]"),
        (ids, None, "needs prefix_embeds"),
        (ids, np.full_like(e, np.nan), "NaN"),
        (ids + 1000, e, "this model has tokens"),
        (ids.astype(float), e, "expected integers"),
        (ids[0], e, "expected integers"),
    ):
        with pytest.raises(ExportError, match=message):
            lm.token_log_probs(bad_ids, bad_e)


def test_threads_are_those_asked_for(export: Path) -> None:
    for threads in (1, 2):
        lm = OnnxFusionLM(export, device="cpu", threads=threads)
        options = lm._sequences._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    assert OnnxFusionLM(export).threads >= 1
    with pytest.raises(ExportError, match="threads must be from 1 to"):
        OnnxFusionLM(export, threads=0)


@pytest.mark.parametrize("name", ["model.onnx", "step.onnx", "encoder.onnx", "tokenizer.json"])
def test_files_that_are_not_the_manifests_are_refused(name: str, export: Path) -> None:
    data = (export / name).read_bytes()
    (export / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ExportError, match=f"{name} is not the file that was exported"):
        OnnxFusionLM(export)
    (export / name).unlink()
    with pytest.raises(ExportError, match=f"{name} is missing"):
        OnnxFusionLM(export)


def test_folders_that_are_no_export_are_refused(export: Path, tmp_path: Path) -> None:
    manifest = unsealed(export / "manifest.json")
    for change, message in (
        ({"opset": 19}, "opset 19"),
        ({"format": 99}, "format 99"),
    ):
        (export / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ExportError, match=message):
            read_manifest(export)
    (export / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="cannot be read"):
        read_manifest(export)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat.")
    assert "holds no manifest.json" in fails("score", "--onnx", tmp_path, "--text", text)


def test_an_absent_provider_is_refused(export: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(ExportError, match="CUDAExecutionProvider is not in this ONNX Runtime"):
        OnnxFusionLM(export, device="cuda")
    with pytest.raises(ExportError, match="unknown device 'tpu'"):
        OnnxFusionLM(export, device="tpu")
    assert OnnxFusionLM(export, device="auto").device == "cpu"


def test_threads_rest_between_calls(export: Path) -> None:
    """Each of an export's sessions has threads of its own, which would spin against the others'."""
    lm = OnnxFusionLM(export, device="cpu", threads=2)
    for session in (lm._step_session, lm._sequences._session, lm.planner.encoder._session):
        options = session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_cuda_that_does_not_start_is_refused(export: Path, monkeypatch) -> None:
    """As where onnxruntime-gpu finds no CUDA libraries: it warns and goes on with the CPU."""
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=providers[1:]),
    )
    with pytest.raises(ExportError, match="CUDAExecutionProvider could not be started"):
        OnnxFusionLM(export, device="cuda")


def test_auto_goes_on_with_the_cpu_and_says_why(export: Path, monkeypatch, capsys) -> None:
    """Where CUDA is there and does not start, and for int8, which it has no kernels for."""
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    real, asked = onnxruntime.InferenceSession, []

    def without_cuda(path, options, providers):
        asked.append(providers[0])
        own = [p for p in providers if isinstance(p, str)]
        return real(path, options, providers=own)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    assert OnnxFusionLM(export).device == "cpu"
    assert asked[0] == ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert (
        "running on the CPU: CUDAExecutionProvider could not be started" in capsys.readouterr().err
    )
    asked.clear()
    assert choose_device("auto", "int8", export / "model.onnx") == "cpu"
    assert not asked
    assert "running on the CPU: int8 products have no CUDA kernels" in capsys.readouterr().err
    with pytest.raises(ExportError, match="int8 products have no CUDA kernels"):
        choose_device("cuda", "int8", export / "model.onnx")


def test_a_device_that_computes_otherwise_is_refused(export: Path) -> None:
    exported = OnnxFusionLM(export, device="cpu")
    probe = exported.manifest["verified"]["probe"]
    exported._sequences.check_probe(probe)
    with pytest.raises(ExportError, match=r"up to 0\.01 nats from those that were verified"):
        exported._sequences.check_probe([*probe[:-1], probe[-1] + 0.01])


def test_edges(export: Path) -> None:
    exported = OnnxFusionLM(export, device="cpu")
    e = np.zeros((1, 2, exported.model["prefix_size"]), dtype=np.float32)
    for wrong in (-1, -100, exported.model["vocab_size"]):
        with pytest.raises(ExportError, match="this model has tokens"):
            exported.token_log_probs(np.array([[1, 2, wrong]]), e)
    padded = exported.token_log_probs(np.array([[1, 2, -100]]), e, np.array([2]))
    assert padded.shape == (1,)
    none = np.zeros((0, 3), dtype=np.int64)
    assert exported.token_log_probs(none, e[:0]).shape == (0,)
    assert exported.generate([]) == []
    assert exported.generate(["", ""], max_new_tokens=2)


def test_a_manifest_that_names_other_folders_is_refused(export: Path, tmp_path: Path) -> None:
    manifest = unsealed(export / "manifest.json")
    for name in ("../secret", "/etc/hostname"):
        manifest["files"] = {name: {"sha256": "0", "bytes": 1}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ExportError, match="does not lie beside it"):
            read_manifest(tmp_path)


def test_an_old_or_missing_runtime_is_refused(export: Path, monkeypatch) -> None:
    check_version("1.22.0")
    check_version("2.0.0")
    for old in ("1.21.9", "1.9.0", "0.5"):
        with pytest.raises(ExportError, match=f"ONNX Runtime {old} is too old"):
            check_version(old)
    manifest = unsealed(export / "manifest.json")
    changed = json.dumps(manifest | {"oldest_onnxruntime": "99.0"})
    (export / "manifest.json").write_text(changed)
    with pytest.raises(ExportError, match=r"is too old: 99\.0"):
        OnnxFusionLM(export)
    monkeypatch.setattr(onnxruntime, "__version__", "1.5.1")
    with pytest.raises(ExportError, match=r"ONNX Runtime 1\.5\.1 is too old"):
        OnnxFusionLM(export)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="pip install onnxruntime"):
        OnnxFusionLM(export)


def test_a_model_without_its_encoder_says_so(bpe, tmp_path: Path) -> None:
    folder = saved_model(tmp_path, bpe, "counts", fusion="concat")
    export_model(str(folder), tmp_path / "onnx")
    lm = OnnxFusionLM(tmp_path / "onnx")
    with pytest.raises(ExportError, match="exported without its encoder"):
        lm.score("The cat sat.")
    ids, e = np.array([[1, 5, 2]]), np.zeros((1, 12), np.float32)
    assert np.isfinite(lm.token_log_probs(ids, e)).all()


def test_options_settled_at_export_are_refused(export: Path, text_file: Path) -> None:
    base = ["score", "--onnx", export, "--text", text_file]
    for option, value in (("--dtype", "bfloat16"), ("--backend", "torch"), ("--encoder", "x")):
        assert f"{option} does not go with --onnx" in fails(*base, option, value)
    assert "--store does not go with --onnx" in fails(*base, "--store", "x")
    assert "one of the two" in fails("score", "--text", text_file)
    assert "one of the two" in fails("score", "some-model", *base[1:])
    assert "--threads goes with --onnx" in fails(
        "score", "m", "--text", text_file, "--threads", "1"
    )


def test_generate_streams_the_same_text(bert_pair) -> None:
    torch_lm, lm = bert_pair
    base = ["generate", "--onnx", lm.folder, "--prompt", "The cat", "--max-new-tokens", 9]
    code, stdout, stderr = run(*base, "--temperature", 0)
    assert (code, stderr) == (0, "")
    assert stdout == torch_lm.generate("The cat", max_new_tokens=9)[0] + "\n"
    code, beams, _ = run(*base, "--beam", 2)
    expected = torch_lm.generate("The cat", max_new_tokens=9, num_beams=2)[0] + "\n"
    assert (code, beams) == (0, expected)
