"""Exports in processes without the package, under two versions of transformers, and beside it."""

import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import tiny, tiny_config

from openmythos import OpenMythos, Sampling
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.hub import export
from openmythos.nn.grouped_query import GroupedQueryAttention

OLDER = "5.23.0"  # the last version before past_key_values became cache
ROOT = Path(__file__).parents[2]
WORDS = "a <|bos|> caf\u00e9\n  42"
pytestmark = pytest.mark.slow


def other_python(name: str, *packages: str) -> str:
    """A Python that sees the packages of this one and has others of its own, in .venv-hub/."""
    folder = ROOT / ".venv-hub" / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    shared = sysconfig.get_path("purelib")
    wanted = "\n".join((*packages, shared))
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        found = next(folder.glob("lib/python*/site-packages"))
        (found / "shared.pth").write_text(shared + "\n")
        pinned = folder / "constraints.txt"
        pinned.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "-c", pinned, *packages], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot install {', '.join(packages)}: {done.stderr[-200:]}")
        stamp.write_text(wanted)
    return str(python)


def environment(tmp_path: Path, *, with_package: bool) -> dict[str, str]:
    names = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    names |= {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if with_package:
        names["PYTHONPATH"] = str(ROOT / "src")
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | names


def small_models() -> dict[str, OpenMythos]:
    """Latent attention with experts and a tied head; grouped queries, untied; halting."""
    configs = {
        "tied": tiny_config(vocab_size=257, context=48),
        "untied": tiny_config(
            vocab_size=257, context=48, attention=tiny(GroupedQueryAttention), tie_embeddings=False
        ),
    }
    models = {name: OpenMythos(config, seed=1).eval() for name, config in configs.items()}
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return models


def inputs() -> dict[str, Any]:
    text = torch.randint(1, 257, (2, 14))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    return {
        "prompt": torch.randint(1, 257, (1, 9)),
        "padded": torch.randint(1, 257, (2, 9)) * mask,
        "mask": mask,
        "text": text,
        "documents": torch.tensor([[*range(6), *range(8)], [*range(11), *range(3)]]),
        "new": 10,
        "seed": 3,
        "words": WORDS,
    }


@pytest.fixture(scope="module", params=["alone", "alone, older", "beside"])
def checked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, OpenMythos], dict[str, Any], dict[str, Any], Path]:
    """(models, what was given, what the other process found, the folder that it saved)."""
    torch.manual_seed(0)
    tmp_path = tmp_path_factory.mktemp("outside")
    models, given, way = small_models(), inputs(), request.param
    python = sys.executable
    if way == "alone, older":
        python = other_python("transformers-older", f"transformers=={OLDER}")
    given["folders"] = {name: str(tmp_path / name) for name in models}
    given |= {"blocked": way != "beside", "saved": str(tmp_path / "saved")}
    for name, model in models.items():
        export.write(model, tmp_path / name, text=export.Text(tokenizer=ByteTokenizer()))
    torch.save(given, tmp_path / "in.pt")
    command = [python, Path(__file__).with_name("outside.py"), tmp_path / "in.pt"]
    names = environment(tmp_path, with_package=not given["blocked"])
    done = subprocess.run(
        [*command, tmp_path / "out.pt"], capture_output=True, text=True, env=names
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    assert (found["version"] == OLDER) == (way == "alone, older")
    return models, given, found, tmp_path


def test_logits_are_the_models_own(checked: Any) -> None:
    models, given, found, _ = checked
    text, documents = given["text"], (given["documents"] == 0).cumsum(1)
    for name, model in models.items():
        own = found[name]["logits"]
        with torch.no_grad():
            for loops in (1, 2, 5):
                assert torch.equal(own[f"loops_{loops}"], model(text, num_loops=loops).logits)
            whole = model(text).logits
            assert torch.equal(own["default"], whole)
            torch.testing.assert_close(own["some"], whole[:, [1, 4]])
            torch.testing.assert_close(own["packed"], model(text, documents=documents).logits)
            torch.testing.assert_close(own["in_pieces"], whole, atol=2e-5, rtol=1e-5)
        head = model.head_weight.detach()
        torch.testing.assert_close(own["backbone"] @ head.T, whole, atol=2e-5, rtol=1e-5)


def test_tokens_are_the_models_own(checked: Any) -> None:
    models, given, found, _ = checked
    new, prompt = given["new"], given["prompt"]
    for name, model in models.items():
        own, bos = found[name]["generated"], ByteTokenizer.bos_id
        usual = {"max_new_tokens": new, "stop_id": bos}
        greedy = model.generate(prompt, **usual)
        for way in ("greedy", "uncached", "lookup"):
            assert torch.equal(own[way], greedy), way
        assert torch.equal(own["five_loops"], model.generate(prompt, num_loops=5, **usual))
        native = model.generate(given["padded"], attention_mask=given["mask"].bool(), **usual)
        for way in ("padded", "padded_uncached"):
            assert torch.equal(own[way], native), way
        sampling = Sampling(temperature=0.8, seed=given["seed"])
        assert torch.equal(own["sampled"], model.generate(prompt, sampling=sampling, **usual))


def test_beams_are_likelier_than_the_greedy_tokens(checked: Any) -> None:
    """And the same with and without a cache, which is reordered at every step."""
    models, given, found, _ = checked

    def score(model: OpenMythos, tokens: Tensor) -> float:
        whole = torch.cat((given["prompt"], tokens[None]), dim=1)
        with torch.no_grad():
            logs = model(whole).logits.log_softmax(-1)[0, -len(tokens) - 1 : -1]
        return float(logs.gather(1, tokens[:, None]).sum())

    for name, model in models.items():
        own = found[name]["generated"]
        assert torch.equal(own["beams"], own["beams_uncached"])
        assert own["beams"].shape[0] == 2
        assert not torch.equal(own["beams"][0], own["beams"][1])
        assert score(model, own["beams"][0]) >= score(model, own["greedy"][0]) - 1e-4


def test_checkpointing_changes_no_gradient(checked: Any) -> None:
    models, given, found, _ = checked
    for name, model in models.items():
        own = found[name]["gradients"]
        assert torch.equal(own["loss_stored"], own["loss_checkpointed"])
        torch.testing.assert_close(own["gradient_stored"], own["gradient_checkpointed"])
        native = model.losses(given["text"][:, :-1], given["text"][:, 1:]).cross_entropy
        torch.testing.assert_close(own["loss_stored"], native.detach(), atol=2e-5, rtol=1e-5)


def test_a_saved_model_is_the_same(checked: Any) -> None:
    """Weights and code are equal byte for byte; num_loops is a field of the config."""
    models, _, found, tmp_path = checked
    name = list(models)[-1]
    assert torch.equal(found["again"], found[name]["logits"]["default"])
    assert found["eight"] == 8

    def digest(folder: str) -> dict[str, str]:
        paths = [*(tmp_path / folder).glob("*.py"), tmp_path / folder / "model.safetensors"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    assert digest("saved") == digest(name)


def test_the_tokenizer_is_the_packages_own(checked: Any) -> None:
    found = checked[2]
    tokenizer = ByteTokenizer()
    assert found["ids"] == [tokenizer.bos_id, *tokenizer.encode(WORDS)]
    assert found["words"] == WORDS
