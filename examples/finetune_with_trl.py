"""Fine-tune an exported model with trl's SFTTrainer. Needs transformers, trl and datasets.

openmythos export runs/mine --format hf --out hub/mine
python examples/finetune_with_trl.py hub/mine tuned
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, out = sys.argv[1:]
sums = [{"text": f"{i} + {j} = {i + j}"} for i in range(10) for j in range(10)]

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
# The number of loops is the config's in every step.
model = AutoModelForCausalLM.from_pretrained(folder, num_loops=4, trust_remote_code=True)

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=out,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        max_length=32,
        packing=True,  # attention stays inside each document
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),  # else trl computes in bf16
    ),
    train_dataset=Dataset.from_list(sums),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model(out)  # weights, config, code and tokenizer

again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
inputs = tokenizer("3 + 4 =", return_tensors="pt", return_token_type_ids=False)
for num_loops in (1, 4, 8):
    new = again.generate(**inputs, max_new_tokens=6, do_sample=False, num_loops=num_loops)
    print(f"{num_loops} loops: {tokenizer.decode(new[0], skip_special_tokens=True)!r}")
