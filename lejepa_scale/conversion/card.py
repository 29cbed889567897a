"""README.md of a converted encoder, as model hubs read it: what it is, how it was made, how its images are prepared, how it
is loaded."""

from __future__ import annotations

import json
from typing import Any

import yaml

from lejepa_scale.conversion.model import Model

_TAGS = ["image-feature-extraction", "self-supervised-learning", "lejepa"]
SNIPPETS = {
    "timm": """import timm, torch
from PIL import Image

model = timm.create_model("local-dir:{path}", pretrained=True).eval()  # or "hf-hub:USER/NAME"
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data, is_training=False)
with torch.inference_mode():
    features = model(transform(Image.open("{image}").convert("RGB"))[None])  # [1, {width}]""",
    "transformers": """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{path}"), AutoModel.from_pretrained("{path}").eval()
with torch.inference_mode():
    images = processor(Image.open("{image}").convert("RGB"), return_tensors="pt")
    features = model(**images).pooler_output  # [1, {width}]""",
    "transformers of ViTModel": """import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("{path}")
model = ViTModel.from_pretrained("{path}", add_pooling_layer=False).eval()  # whose pooling layer has no weights
with torch.inference_mode():
    images = processor(Image.open("{image}").convert("RGB"), return_tensors="pt")
    features = model(**images).last_hidden_state[:, 0]  # [1, {width}]""",
    "safetensors": """import json, timm, torch
from safetensors import safe_open

with safe_open("{path}", "pt") as file:
    about = file.metadata()
    model = timm.create_model(**json.loads(about["timm"])).eval()
    model.load_state_dict({{name: file.get_tensor(name) for name in file.keys() if name in model.state_dict()}})
mean, std = (torch.tensor(json.loads(about[key])).view(-1, 1, 1) for key in ("mean", "std"))
with torch.inference_mode():
    features = model((torch.rand(1, {channels}, {size}, {size}) - mean) / std)  # [1, {width}]""",
    "onnx": """import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{path}")
images = np.zeros((1, {channels}, {size}, {size}), np.float32)  # standardized with mean and std
features, patches = session.run(None, {{"pixel_values": images}})  # [1, {width}] and [1, patches, {inner}]""",
}


def card(
    model: Model, *, loads: list[str], library: str, sizes: str, scores: list[dict[str, Any]], path: str = "."
) -> str:
    """loads: which snippets; sizes: at which sizes it is exact; scores: of `lejepa evaluate`."""
    facts, inputs = model.facts, model.inputs
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-feature-extraction", "tags": [*_TAGS]}
    front["tags"] += sorted({"timm", "transformers"} if "timm" in loads else {library})
    if facts.get("license"):
        front["license"] = facts["license"]
    name = facts.get("encoder") or model.architecture
    head = yaml.safe_dump(front, sort_keys=False).strip()
    lines = ["---", head, "---", "", f"# {name}, pre-trained with LeJEPA", ""]
    lines += [
        f"An image encoder ({model.architecture} of timm, {model.parameters / 1e6:.1f} M parameters) trained without "
        "labels: [LeJEPA](https://arxiv.org/abs/2511.08544) predicts the mean of an image's global views from every view "
        "and keeps the embeddings an isotropic Gaussian. Its features are meant to be used frozen.",
        "",
    ]
    if "step" in facts:
        until = "" if facts["final_lambda"] is None else f" to {facts['final_lambda']:g} at the last step"
        lines += [
            "## Training",
            "",
            f"- {facts['step']:,} steps of {facts['batch']:,} images ({facts['images']:,} in all)",
            f"- {facts['weights']} weights",
            f"- data: {', '.join(f'`{shard}`' for shard in facts['data'][:8])}",
            f"- views of an image: {facts['views']}",
            f"- lambda {facts['lambda']:g}{until}, regularizer {facts['regularizer']}, learning rate {facts['lr']:g}, "
            f"weight decay {facts['weight_decay']:g}",
            "",
        ]
    if scores:
        lines += [
            "## Scores",
            "",
            "Frozen features, by `lejepa evaluate`:",
            "",
            "| features | k-NN | linear |",
            "|---|---|---|",
        ]
        lines += [f"| {row['name']} | {row['knn']:.1%} | {row['linear']:.1%} |" for row in scores] + [""]
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (inputs.mean, inputs.std))
    lines += [
        "## Images",
        "",
        f"{inputs.channels} channels; the short side to {inputs.image_size} pixels (bilinear, antialiased), the middle "
        f"{inputs.image_size} x {inputs.image_size} cut out; values as a share of their range, minus mean [{mean}], divided "
        f"by standard deviation [{std}].",
    ]
    if inputs.ranges:
        lines += [
            "",
            f"Stored values are not 8-bit: the range of each source of the training was {json.dumps(list(inputs.ranges))}.",
        ]
    lines += ["", f"Sizes: {sizes}", "", "## Loading", ""]
    width = int(model.arguments.get("num_classes") or 0) or int(model.shapes.head_hidden_size)
    values = {
        "path": path, "image": "image.png", "width": width, "inner": int(model.shapes.num_features),
        "channels": inputs.channels, "size": inputs.image_size,
    }  # fmt: skip
    for kind in loads:
        lines += ["```python", SNIPPETS[kind].format(**values), "```", ""]
    lines += [
        "## Limits",
        "",
        "It has learned what its images show, with their biases, and nothing of what they do not. It has not been tested "
        "for decisions about people.",
        "",
    ]
    return "\n".join(lines)
