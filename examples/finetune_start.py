"""A small Llama and conversations: what fine-tuning starts from if nothing is given.

    python -m examples.finetune_start runs/chat_start

writes what examples/configs/chat_hf.toml trains: model/, train/ and valid/, every tenth
conversation held out.
"""

import json
import sys
from pathlib import Path
from typing import Any

MESSAGE_TOKENS = ("<|im_start|>", "<|im_end|>")
END = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_conversations(path: Path) -> None:
    """Sums of two digits, as JSON Lines of messages."""
    lines = []
    for a in range(10):
        for b in range(10):
            turns = [("user", f"How much is {a} + {b}?"), ("assistant", f"It is {a + b}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.append(json.dumps({"messages": messages}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_model(folder: Path, texts: list[str], **sizes: Any) -> None:
    """A Llama with random weights and a byte-level BPE tokenizer that has learnt `texts`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, *MESSAGE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=MESSAGE_TOKENS[1], pad_token=END, chat_template=CHATML
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **sizes,
        },
        vocab_size=-(-len(tokenizer) // 64) * 64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_all(folder: Path, **sizes: Any) -> None:
    """The model, and the conversations to learn and to evaluate on, below `folder`."""
    for name in ("train", "valid"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_conversations(folder / "sums.jsonl")
    lines = (folder / "sums.jsonl").read_text().splitlines(keepends=True)
    (folder / "sums.jsonl").unlink()
    learnt = [line for index, line in enumerate(lines) if index % 10]
    (folder / "train" / "sums.jsonl").write_text("".join(learnt))
    (folder / "valid" / "sums.jsonl").write_text("".join(lines[::10]))
    write_model(folder / "model", lines, **sizes)


if __name__ == "__main__":
    write_all(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/chat_start"))
