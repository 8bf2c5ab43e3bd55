"""What `fusion-lm export` writes, what it verifies, and what it refuses."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES
from fusion_model.export import export_model
from fusion_model.export import exporter as exporter_module
from fusion_model.export.graphs import language as graphs_module
from fusion_model.export.runtime.model import open_encoder
from fusion_model.export.runtime.tokenizer import TextTokenizer, describe_tokenizer
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model, session
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from test_cli import fails, run

import fusion_model
from fusion_model.encoders import load_encoder
from fusion_model.encoders.controls import BagEncoder
from fusion_model.errors import ExportError
from fusion_model.files import replacing

TEXTS = ["", "The cat", "The cat sat on the mat.", "A dog, is it not?", "mat"] * 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, bpe) -> Path:
    torch.manual_seed(0)  # a fixture of a module comes before the seed of its tests
    return saved_model(tmp_path_factory.mktemp("model"), bpe, "counts", fusion="gate")


def test_the_command_writes_a_whole_folder_and_says_what_it_verified(
    model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("export", model_folder, out, "--encoder", "--precision", "int8")
    assert (code, stderr) == (0, "")
    names = {"model.onnx", "step.onnx", "config.json", "generation_config.json", "tokenizer.json"}
    names |= {"tokenizer_config.json", "counts.json", "manifest.json", "weights.bin"}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    for name, recorded in manifest["files"].items():
        data = (out / name).read_bytes()
        assert recorded == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert (manifest["precision"], manifest["opset"]) == ("int8", 20)
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["onnxruntime"] == onnxruntime.__version__
    parity = manifest["verified"]["parity"]
    assert 0 < parity["max_error_pytorch_nats"] < 1e-5
    assert 1e-5 < parity["max_error_sequence_nats"] < 0.1  # int8 is not exact
    mean, worst = parity["mean_error_step_nats"], parity["max_error_step_nats"]
    assert mean < worst
    assert f"step by step  mean {mean:.1e}, greatest {worst:.1e}" in stdout
    assert f"{parity['perplexity_ratio']:.6f} times PyTorch's" in stdout
    assert manifest["verified"]["nodes"]["step.onnx"]["Scan"] == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loaded_model_exports_and_its_figures_are_within_limits(
    precision: str, model_folder: Path, tmp_path: Path
) -> None:
    lm = fusion_model.load(str(model_folder))
    parity = export_model(lm, tmp_path / "out", precision=precision, opset=21)["verified"]["parity"]
    limit = {"fp32": 1e-5, "fp16": 1e-2}[precision]
    assert parity["max_error_sequence_nats"] < limit
    assert parity["max_error_step_nats"] < limit
    assert abs(parity["perplexity_ratio"] - 1) < limit
    exported = onnx.load(tmp_path / "out" / "model.onnx")
    assert exported.producer_version == fusion_model.__version__
    assert "Log-probabilities of given targets" in exported.doc_string
    facts = {p.key: p.value for p in exported.metadata_props}
    assert facts["fusion"] == lm.model.config.fusion
    opsets = exported.opset_import
    assert [(o.domain, o.version) for o in opsets] == [("", 21)]


def test_exporting_leaves_the_model_as_it_was(model_folder: Path, tmp_path: Path) -> None:
    lm = fusion_model.load(str(model_folder), dtype="bfloat16")
    export_model(lm, tmp_path / "out")
    assert lm.model.dtype == torch.bfloat16


def test_an_export_that_disagrees_with_pytorch_is_not_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = graphs_module._Parts._layer

    def gates_in_pytorchs_order(self, k: int) -> list[np.ndarray]:
        return [self._weights[f"lstm.weight_ih_l{k}"][None], *right(self, k)[1:]]

    monkeypatch.setattr(graphs_module._Parts, "_layer", gates_in_pytorchs_order)
    line = fails("export", model_folder, tmp_path / "out")
    assert "does not agree with PyTorch" in line
    assert not list(tmp_path.iterdir())


def test_int8_that_costs_too_much_perplexity_is_not_kept(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusion_model.export.verify.TEXT_LIMIT", 1e-9)
    line = fails("export", model_folder, tmp_path / "out", "--precision", "int8")
    assert "perplexity" in line
    assert not list(tmp_path.iterdir())


def test_requests_that_make_no_sense_are_refused(model_folder: Path, tmp_path: Path) -> None:
    assert "unknown precision 'int4'" in fails(
        "export", model_folder, tmp_path / "o", "--precision", "int4"
    )
    assert "opset 13 is not supported" in fails(
        "export", model_folder, tmp_path / "o", "--opset", "13"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "holds something else" in fails("export", model_folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert "model.safetensors" in fails("export", tmp_path / "mine", tmp_path / "o")


def test_only_an_exports_own_files_are_replaced(model_folder: Path, tmp_path: Path) -> None:
    (app := tmp_path / "app").mkdir()
    (app / "manifest.json").write_text('{"name": "an app of another kind"}')
    assert "(manifest.json)" in fails("export", model_folder, app)
    assert (app / "manifest.json").exists()
    export_model(str(model_folder), out := tmp_path / "out")
    (out / "surprisal.tsv").write_text("precious")
    assert "(surprisal.tsv)" in fails("export", model_folder, out)
    assert (out / "surprisal.tsv").read_text() == "precious"
    assert f"run it with --onnx {out}" in fails("score", out, "--text", out / "surprisal.tsv")
    (tmp_path / "saving-new").mkdir()
    export_model(str(model_folder), tmp_path / "new")
    assert (tmp_path / "saving-new").is_dir()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_folder_that_cannot_be_replaced_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "out").mkdir()
    (folder / "old").touch()

    def again() -> None:
        with replacing(folder) as new:
            new.mkdir()
            (new / "new").touch()

    def replace(path: Path, to: Path) -> None:
        if path.name == ".saving-out":
            raise OSError(16, "Device or resource busy")
        os.replace(path, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="busy"):
            again()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert [p.name for p in folder.iterdir()] == ["old"]
        patched.setattr(Path, "is_mount", lambda _: True)
        with pytest.raises(OSError, match="mount point cannot be replaced"):
            again()
    again()
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_int8_takes_no_wrong_encoder(tmp_path: Path) -> None:
    arguments = ("export", "fusion-lm-small", tmp_path / "out", "--precision", "int8")
    wrong = fails(*arguments, "--encoder-path", tmp_path / "none")
    assert "cannot load the encoder" in wrong


def test_an_earlier_export_is_replaced(model_folder: Path, tmp_path: Path) -> None:
    export_model(str(model_folder), tmp_path / "out", encoder=True)
    export_model(str(model_folder), tmp_path / "out", precision="int8")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["precision"] == "int8"
    assert not (tmp_path / "out" / "counts.json").exists()


def exported_encoder(folder: Path, pooling: str, out: Path) -> tuple[Any, Any]:
    encoder = load_encoder(str(folder), pooling)
    out.mkdir()
    described = exporter_module._write_encoder(encoder, out, "fp32", 20)
    assert described is not None
    assert described["max_relative_difference"] < 1e-5
    return encoder, open_encoder(out, {"encoder": described, "model": {}}, "cpu", 1)


def agrees(encoder, exported: Any) -> None:
    inputs = encoder.inputs_from_texts(TEXTS)
    assert exported.inputs_from_texts(TEXTS) == inputs
    assert exported.inputs_from_ids([[5, 6], []]) == encoder.inputs_from_ids([[5, 6], []])
    found, expected = exported.encode(inputs), encoder.encode(inputs).numpy()
    assert found.shape == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert exported.encode([]).shape == (0, encoder.dim)


def test_encoder_comes_out_with_its_poolings(bert_folder: Path, tmp_path: Path) -> None:
    agrees(*exported_encoder(bert_folder, "static+mean+mask+pooler", tmp_path / "out"))
    dims = session(tmp_path / "out" / "encoder.onnx").get_inputs()[0].shape
    assert "`input_ids`" in onnx.load(tmp_path / "out" / "encoder.onnx").doc_string
    assert all(isinstance(dim, str) for dim in dims)  # neither was frozen


def test_static_embeddings_are_one_look_up(bert_folder: Path, tmp_path: Path) -> None:
    _, exported = exported_encoder(bert_folder, "static", tmp_path / "out")
    exported._session = None  # not asked
    agrees(_, exported)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_architectures_export(architecture: str, encoder_folders, tmp_path: Path) -> None:
    pooling = "cls+mean+last+sep+mask+static"
    agrees(*exported_encoder(encoder_folders[architecture], pooling, tmp_path / "out"))


def test_an_encoder_that_came_out_wrong_is_refused(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporter_module.incremental_graph

    def other_weights(model, *options) -> onnx.ModelProto:
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            weight.mul_(1.01)
        found = right(model, *options)
        with torch.no_grad():
            weight.div_(1.01)
        return found

    monkeypatch.setattr(exporter_module, "incremental_graph", other_weights)
    with pytest.raises(ExportError, match="vectors differ"):
        exported_encoder(bert_folder, "static", tmp_path / "out")


@pytest.mark.parametrize("name", ["counts", "tfidf"])
def test_bags_of_words_need_no_scikit_learn(name: str, tmp_path: Path, monkeypatch) -> None:
    encoder = BagEncoder.fit(name, SENTENCES, dim=20)
    encoder.save(tmp_path)
    texts = [*TEXTS, "THE the Cat's sat a I"]
    kind = TfidfVectorizer if name == "tfidf" else CountVectorizer
    expected = kind(max_features=20).fit(SENTENCES).transform(texts).toarray()
    assert np.abs(expected).max() > 0.1
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    for bag in (encoder, BagEncoder.load(name, tmp_path)):
        found = bag.encode(bag.inputs_from_texts(texts))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_tokenizer_is_the_same_without_transformers(bpe, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    light = TextTokenizer(tmp_path / "tokenizer.json", describe_tokenizer(bpe))
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    for text in SENTENCES[:8]:
        expected, found = bpe(text, **options), light(text, **options)
        assert found["input_ids"] == expected["input_ids"]
        assert [tuple(o) for o in found["offset_mapping"]] == expected["offset_mapping"]
        assert light.decode([1, *found["input_ids"], 2], skip_special_tokens=True) == text
    assert light(SENTENCES, **options)["input_ids"] == bpe(SENTENCES, **options)["input_ids"]
    assert len(light) == len(bpe)
    assert light.get_vocab() == bpe.get_vocab()
    assert (light.bos_token_id, light.eos_token_id, light.pad_token_id) == (1, 2, 0)
