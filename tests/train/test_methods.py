"""What each way of fine-tuning trains, and at which rate."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from dcft_dist.config.method import Lora
from dcft_dist.config.toml import load_config
from dcft_dist.errors import ConfigError
from dcft_dist.models.pretrained import Pretrained
from dcft_dist.train.adapters import fill_adapters, insert_adapters, merge_adapters
from dcft_dist.train.methods import choose_trained


def pretrained() -> Pretrained:
    """Three blocks between a layer and a norm, and a head."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU()) for _ in range(3)]
    parts = OrderedDict(below=nn.Linear(4, 6), blocks=nn.Sequential(*blocks), above=nn.LayerNorm(6), head=nn.Linear(6, 2))
    nothing: Any = None  # no inputs are made here
    return Pretrained(nn.Sequential(parts), ("head",), list(blocks), nothing)


def _trained(net: Pretrained) -> set[str]:
    return {name for name, p in net.module.named_parameters() if p.requires_grad}


def test_bitfit_trains_biases_and_the_head() -> None:
    net = pretrained()
    choose_trained(net, load_config("smoke.toml", ["--method", "bitfit"]))
    biases = {"below.bias", "above.bias", *(f"blocks.{i}.{j}.bias" for i in range(3) for j in (0, 1))}
    assert _trained(net) == biases | {"head.weight", "head.bias"}


def test_adapters_start_at_nothing_and_merge_into_the_weights() -> None:
    """Hu et al. 2022: W + alpha / rank * B A, with B zero at first."""
    net = pretrained()
    module, before = net.module, copy.deepcopy(net.module)
    words = ["--method", "lora", "--engine", "single", "--lora.rank", "2", "--lora.alpha", "8"]
    choose_trained(net, load_config("smoke.toml", words))
    inputs = torch.randn(5, 4)
    assert torch.equal(module(inputs), before(inputs))
    trained = _trained(net)
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 2 * 4  # two for each linear layer of the body

    adapters = {name: p for name, p in module.named_parameters() if "lora_" in name}
    for p in adapters.values():
        nn.init.normal_(p)
    changed = module(inputs)
    merge_adapters(module, module)
    after = module.state_dict()
    assert after.keys() == before.state_dict().keys()
    for name in ("below", "blocks.0.0", "blocks.1.0", "blocks.2.0"):
        low, high = (next(p for n, p in adapters.items() if n.startswith(f"{name}.lora_{side}")) for side in "AB")
        torch.testing.assert_close(after[f"{name}.weight"], before.state_dict()[f"{name}.weight"] + 4 * high @ low)
    torch.testing.assert_close(module(inputs), changed)


def test_a_set_beside_adapters_needs_something_to_score() -> None:
    words = ["--method", "lora_dcft", "--engine", "single", "--lora.beside", '["above", "blocks.*.1"]']
    with pytest.raises(ConfigError, match=r"name what to score in importance.eligible, such as 'blocks.0.1.weight'"):
        choose_trained(pretrained(), load_config("smoke.toml", words))
    choose_trained(pretrained(), load_config("smoke.toml", [*words, "--importance.eligible", '["above"]']))


class Encoder(nn.Module):
    """An encoder layer of torch, a tied pair, a head and a convolution with names that end like a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.fc = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 7, bias=False)
        self.tied.weight = self.words.weight
        self.conv = nn.ModuleDict({"fc": nn.Conv1d(8, 8, 1)})
        self.head = nn.ModuleDict({"fc": nn.Linear(7, 3)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.fc(self.layer(self.words(ids)))
        x = x + self.conv["fc"](x.transpose(1, 2)).transpose(1, 2)
        return self.head["fc"](self.tied(x).mean(1))  # type: ignore[no-any-return]


def test_adapters_are_only_where_they_work() -> None:
    """Training, evaluation and the merged model agree, and the head is trained itself."""
    torch.manual_seed(0)
    net, fast = Encoder(), torch.backends.mha.get_fastpath_enabled()
    names = set(dict(net.named_parameters()))
    insert_adapters(net, {"head.fc.weight", "head.fc.bias"}, Lora(rank=2))
    try:
        fill_adapters(net, 0)
        adapted = {name for name, m in net.named_modules() if hasattr(m, "base_layer")}
        assert adapted == {"layer.linear1", "layer.linear2", "fc"}
        assert net.head["fc"].weight.requires_grad and not net.conv["fc"].weight.requires_grad
        for name, p in net.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
        ids = torch.arange(6).view(2, 3)
        trained = net.train()(ids)
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(ids), trained)
            torch.testing.assert_close(net(ids), trained)
        merge_adapters(net, net)
        torch.testing.assert_close(net(ids), trained)
        assert set(dict(net.named_parameters())) == names
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    with pytest.raises(ConfigError, match=r"lora.target_modules: 'linear3' names no linear layer .*did you mean 'linear\d'"):
        insert_adapters(Encoder(), set(), Lora(target_modules=["linear3"]))
    with pytest.raises(ConfigError, match="the body has no linear layer to adapt"):
        insert_adapters(nn.Sequential(nn.Linear(2, 2)), {"0.weight"}, Lora())
