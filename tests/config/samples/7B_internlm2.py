# ruff: noqa: F403, F405
# Sizes and run time from two other files, changed here.
from internlm.core.context.parallel_context import read_base

with read_base():
    from samples._base_.runtime import *  # by the name of this folder, as in InternEvo

    from ._base_.models.internlm2_7B import *

JOB_NAME = f"internlm2_{HIDDEN_SIZE // NUM_ATTENTION_HEAD}x{NUM_ATTENTION_HEAD:03d}"
LONG_CONTEXT = False
SEQ_LEN = 4096 if not LONG_CONTEXT else 1 << 15
FOLDERS = ["/data/tokens", "/data/valid"]
STEPS, WARMUP = (1000 * 10, 0.025)
assert_every: int = 50

data = dict(
    seq_len=SEQ_LEN,
    micro_num=max(2, 4),
    micro_bsz=1,
    total_steps=STEPS,
    train_folder=FOLDERS[0],
    valid_folder=FOLDERS[-1],
    valid_every=assert_every,
)
adam = {**dict(lr=1e-4, adam_beta1=0.9), "adam_beta2": 0.95, "weight_decay": 0.1}
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=WARMUP, eta_min=adam["lr"] / 10)
ckpt = dict(
    save_ckpt_folder=f"local:{JOB_NAME}/ckpts",
    checkpoint_every=float("inf") if LONG_CONTEXT else 1000,
    load_ckpt_info=dict(path="/weights", content=("model",), ckpt_type="hf_llama"),
    auto_resume=False,
)

if LONG_CONTEXT:
    model["rope_base"] = 50000000
else:
    model.update(checkpoint=round(1 / 3, 2))
parallel["tensor"] = dict(parallel["tensor"], size=2, mode="msp")
parallel["pipeline"]["size"] = len(FOLDERS)
