"""Where InternEvo's configs say that checkpoints are, in our keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ilm_compile.config.options import shown
from ilm_compile.config.table import Table
from ilm_compile.internevo.config.translate import NoEffect, Refusal

_FORMATS = {"internevo": "internlm", "internlm": "internlm", "normal": "internlm"}
_HF_FORMATS = {"hf": "hf", "hf_llama": "hf-llama", "hf_internlm2": "hf-internlm2"}


def choice(table: Mapping[str, Any], instead: str) -> Callable[[Any], Any]:
    """A conversion by table; any other value is refused."""

    def convert(value: Any) -> Any:
        if not isinstance(value, str) or value not in table:
            raise Refusal(f"{shown(value)} is not supported: {instead}")
        return table[value]

    return convert


def folder(value: Any) -> Any:
    """Their storage prefixes. local: stays, the vendors' own become fsspec's."""
    kind, _, rest = str(value).partition(":")
    if kind == "boto3" and rest.startswith("s3://"):
        bucket, _, path = rest.removeprefix("s3://").partition("/")
        raise Refusal(
            f"write 's3://{bucket.partition('.')[0]}/{path}' and give the endpoint "
            f"{bucket.partition('.')[2]} with the variable AWS_ENDPOINT_URL"
        )
    if kind in ("volc", "oss2"):
        raise Refusal(f"{shown(value)}: write the S3-compatible URL of the bucket, 's3://...'")
    return value


def endless(value: Any) -> Any:
    """Theirs is inf where it never happens, ours 0."""
    return 0 if isinstance(value, float) and math.isinf(value) else value


def load_folder(value: Any, config: Table) -> dict[str, Any]:
    """The older way to write load_ckpt_info, which wins where both are."""
    newer = config.find("ckpt.load_ckpt_info")
    if newer is not None and newer[0] is not None:
        raise NoEffect("ckpt.load_ckpt_info says where the run starts from")
    return load_info(value, config)


def load_info(value: Any, config: Table) -> dict[str, Any]:
    """Where a run starts from: a path, or dict(path=, content=, ckpt_type=)."""
    resume = config.find("ckpt.auto_resume")
    if resume is None or resume[0] is not False:
        raise NoEffect(
            "as in InternEvo, a run with auto_resume, which is the default, starts from nothing "
            "but its own checkpoints; write auto_resume=False to start from this one"
        )
    if not isinstance(value, dict):
        return {"ckpt.load_path": _local(value)}
    unknown = set(value) - {"path", "content", "ckpt_type"}
    if unknown:
        raise Refusal(f"{min(unknown)!r} is not a key of it; it has path, content and ckpt_type")
    formats, content = _FORMATS | _HF_FORMATS, value.get("content", "model")
    if content not in ("model", ["model"], ("model",)):
        raise Refusal(
            f"content={shown(content)}: of a checkpoint of InternEvo only the weights can be read; "
            "write ('model',)"
        )
    return {
        "ckpt.load_path": _local(value.get("path")),
        "ckpt.load_format": choice(
            formats, f"write one of {', '.join(formats)} as ckpt_type, or ckpt.load_format"
        )(value.get("ckpt_type", "internevo")),
    }


def _local(path: Any) -> Any:
    return folder(path) if isinstance(path, str) else path
