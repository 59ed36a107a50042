"""Fine-tunes exports with peft and trl, in a process of its own: `finetune_outside.py FOLDER`."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

LOAD: dict[str, Any] = {"trust_remote_code": True}
# For each export: what LoRA adapts. A router returns more than a tensor, so it must be left out.
TARGETS: dict[str, list[dict[str, Any]]] = {
    "tied": [
        {"target_modules": ["query", "kv_down", "kv_up", "output"]},
        {"target_modules": "all-linear", "exclude_modules": ["router"]},
    ],
    "untied": [
        {"target_modules": ["query", "key", "value", "output"]},
        {"target_modules": ["gate_up", "down"]},
        {"target_modules": "all-linear", "exclude_modules": ["router"]},
    ],
}


def adapted(folder: Path, name: str, targets: dict[str, Any]) -> dict[str, float]:
    """Train an adapter, decode with it, save it, read it back, merge it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / name, **LOAD)
    tokens = torch.randint(1, 257, (2, 12))
    with torch.no_grad():
        before = base(tokens).logits
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, without
    model.eval()
    usual = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (
        model.generate(input_ids=tokens, use_cache=use, **usual) for use in (True, False)
    )
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        after = model(tokens).logits
        again = AutoModelForCausalLM.from_pretrained(folder / name, **LOAD)
        read = PeftModel.from_pretrained(again, folder / "adapter").eval()(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    return {
        "first": losses[0],
        "last": losses[-1],
        "changed": float((after - before).abs().max()),
        "cache": float((cached != uncached).sum()),
        "read_back": float((read - after).abs().max()),
        "merged": float((merged - after).abs().max()),
    }


def trained(folder: Path, name: str, **options: Any) -> list[float]:
    """The losses of three steps of trl's SFTTrainer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    peft = options.pop("peft", None)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / name, **LOAD)
    model = AutoModelForCausalLM.from_pretrained(folder / name, **LOAD)
    texts = [f"{i} times {j} is {i * j}" for i in range(4) for j in range(6)]
    args = SFTConfig(
        output_dir=str(folder / "sft"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=40,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **{"gradient_checkpointing": False, **options},
    )
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        peft_config=peft,
    )
    trainer.train()
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, choices in TARGETS.items():
        for targets in choices:
            key = f"{name} {targets['target_modules']}"
            found[key] = adapted(folder, name, targets)
    lora = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["router"])
    sft = {
        "plain": trained(folder, "untied"),
        "checkpointed": trained(folder, "untied", gradient_checkpointing=True),
        "packed": trained(folder, "untied", packing=True),  # rows are longer than the context
        "peft": trained(folder, "tied", peft=lora),
    }
    (folder / "found.json").write_text(json.dumps({"peft": found, "sft": sft}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
