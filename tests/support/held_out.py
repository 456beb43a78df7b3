"""The loss of a Hugging Face folder on answers that it has not learnt."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F


def held_out_loss(folder: Path, data: Path, *, every: int = 1) -> float:
    """Of the answers, by transformers alone; every: of so many conversations only the first."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for line in data.read_text().splitlines()[::every]:
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        first = len(tokenizer(asked)["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits
        found.append(F.cross_entropy(logits[0, first - 1 : -1], ids[0, first:], reduction="none"))
    return torch.cat(found).mean().item()
