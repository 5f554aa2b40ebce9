"""`decant export --dtype`: a model directory's weights in another floating-point type, file by file, no model loaded.

Every floating-point tensor is converted; integers and what quantised checkpoints pack stay out: those are refused.
Cost: reading and writing the weights once; memory for one file of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from shared.errors import UsageError


def convert_weights(model_dir: Path, dtype: str) -> None:
    """Convert a model directory's weights to float32, bfloat16 or float16 in place and let its config say so.

    Raises:
        UsageError: the weights are quantised, or a value does not fit the type.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config")
    if config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config")):
        raise UsageError(f"--dtype {dtype}: the weights are quantised, so they have no such type; leave it out")
    wanted, total = getattr(torch, dtype), 0
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(wanted)
                if not bool(torch.isfinite(tensors[name]).all()) and bool(torch.isfinite(tensor).all()):
                    raise UsageError(f"--dtype {dtype}: {name} has values beyond its range; choose bfloat16 or float32")
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, path, metadata=metadata)
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        document = json.loads(index.read_text(encoding="utf-8"))
        document["metadata"] = {**document.get("metadata", {}), "total_size": total}
        index.write_text(json.dumps(document, indent=2), encoding="utf-8")
    for part in (config, text):
        if isinstance(part, dict):
            part.update({name: dtype for name in ("dtype", "torch_dtype") if name in part})
    config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", dtype)
    (model_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
