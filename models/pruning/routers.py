"""The routers before and after fine-tuning, read from the files themselves, and how fine-tuning moved them."""

from pathlib import Path

from models.errors import PlanError
from models.families import FAMILIES
from models.hf_config import family_of, read_json
from models.pruning.stats import RouterPair
from models.weights import read_tensors, tensor_headers, weight_files


def router_pairs(finetuned: Path, pretrained: Path, layers: tuple[int, ...]) -> dict[int, RouterPair]:
    """Both routers of each layer, read from the files themselves.

    Raises PlanError if families, expert counts or widths differ, or the experts of either were re-ordered or cut.
    """
    raws = [read_json(path / "config.json") for path in (pretrained, finetuned)]
    before, after = (family_of(raw).name for raw in raws)
    if before != after:
        raise PlanError(f"the pretrained checkpoint is a {before}, the fine-tuned one a {after}: not the same model")
    template = FAMILIES[after].parameters["layers.{layer}.w_router_ED"][0]
    names = tuple(template.format(layer=layer) for layer in layers)
    files = [weight_files(path) for path in (pretrained, finetuned)]
    old, new = (read_tensors(file, names) for file in files)
    stored = {header[2] for file in files for name, header in tensor_headers(file).items() if name in names}
    pairs = {}
    for layer, name in zip(layers, names, strict=True):
        if old[name].shape != new[name].shape:
            raise PlanError(
                f"{name} is {list(old[name].shape)} before and {list(new[name].shape)} after fine-tuning: "
                "the experts were cut or re-ordered in between, so rows do not correspond"
            )
        pairs[layer] = RouterPair(
            pretrained_ED=old[name].double().numpy(),
            finetuned_ED=new[name].double().numpy(),
            stored_in_16_bit=bool(stored - {"F32"}),
        )
    return pairs
