"""LoRA on an exported model: train, merge, save, load. Needs transformers and peft.

openmythos export runs/mine --format hf --out hub/mine
python examples/lora_with_peft.py hub/mine tuned
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
text = "The same layers run again and again, and every loop sees the input anew."

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(text, return_tensors="pt").input_ids[:, : model.config.max_position_embeddings]

# One adapter serves all loops. A router returns more than a tensor, so it is left out.
lora = LoraConfig(
    r=8, target_modules="all-linear", exclude_modules=["router"], task_type="CAUSAL_LM"
)
model = get_peft_model(model, lora)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(10):
    loss = model(input_ids=tokens, labels=tokens, num_loops=4).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {float(loss):.3f}")

merged = model.merge_and_unload().eval()
merged.save_pretrained(out)  # weights, config and the model's code
tokenizer.save_pretrained(out)

again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
for num_loops in (1, 4, 8):
    with torch.no_grad():
        loss = again(tokens, labels=tokens, num_loops=num_loops).loss
    print(f"{num_loops} loops  loss {float(loss):.3f}")
