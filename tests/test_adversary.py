"""The patch discriminator: its shape, its losses, and how much of a say it has."""

import copy

import pytest
import torch
from torch import Tensor, nn

from raymuse.config.training import AdversarialConfig, OptimizerConfig
from raymuse.training.adversary import Adversary, PatchDiscriminator, discriminator_loss, least_side

SMALL = AdversarialConfig(start=0, channels=8, layers=1, weight=0.5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Decoder(nn.Module):
    """Two layers, of which the last is where the gradients are weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = self.last(self.first(x).relu())
        return drawn


def parts(config: AdversarialConfig = SMALL, rows: int = 4) -> tuple[Adversary, Decoder, Tensor, Tensor]:
    torch.manual_seed(0)
    adversary = Adversary(config, OptimizerConfig(clip_norm=None), seed=1, device="cpu")
    weights = torch.ones(rows)
    weights[-1] = 0
    return adversary, Decoder(), torch.rand(rows, 3, 16, 16), weights


def passed(adversary: Adversary, decoder: Decoder, pictures: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What was drawn, the reconstruction's loss and the adversary's term (B,)."""
    drawn = decoder(pictures)
    reconstruction = (drawn - pictures).abs().flatten(1).mean(dim=1)
    term, _ = adversary.term(pictures, drawn, reconstruction, weights, decoder.last.weight)
    return drawn, reconstruction, term


def test_the_discriminator_is_the_patchgan_of_pix2pix() -> None:
    network = PatchDiscriminator(64, 3)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 1, 6, 10)
    for layers, sees in ((3, 70), (2, 34)):
        small = PatchDiscriminator(8, layers)
        for number, module in enumerate(small.blocks):
            if isinstance(module, nn.GroupNorm):
                small.blocks[number] = nn.Identity()  # it sees the whole picture
        pixels = torch.rand(1, 3, 128, 128, requires_grad=True)
        logits = small(pixels)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        assert pixels.grad is not None
        seen = pixels.grad.abs().sum(dim=(0, 1)) > 0
        assert (int(seen.any(dim=0).sum()), int(seen.any(dim=1).sum())) == (sees, sees)
        assert small(torch.zeros(1, 3, least_side(layers), least_side(layers))).shape == (1, 1, 1, 1)


def test_what_is_said_of_a_picture_does_not_depend_on_its_neighbours() -> None:
    network = PatchDiscriminator(16, 2)
    pictures = torch.rand(6, 3, 32, 32)
    apart = torch.cat([network(pictures[n : n + 1]) for n in range(6)])
    torch.testing.assert_close(network(pictures), apart, atol=1e-6, rtol=1e-5)


def test_its_losses_are_hinge_and_cross_entropy() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]).view(2, 1, 1, 2)
    fake = torch.tensor([[-3.0, 0.5], [1.0, -1.0]]).view(2, 1, 1, 2)
    assert discriminator_loss(real, fake, "hinge").tolist() == [0.5, 1.25]
    told = torch.stack([real.flatten(), fake.flatten()])
    true = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    entropy = nn.functional.binary_cross_entropy_with_logits(told, true, reduction="none")
    rows = (0.5 * entropy.sum(dim=0)).view(2, 2).mean(dim=1)
    torch.testing.assert_close(discriminator_loss(real, fake, "vanilla"), rows)


@pytest.mark.parametrize("parted", [False, True])
def test_its_say_is_the_ratio_of_the_gradients_at_the_last_layer(parted: bool) -> None:
    adversary, decoder, pictures, weights = parts()
    other = copy.deepcopy(adversary.network)
    cuts = [slice(0, 3), slice(3, 4)] if parted else [slice(0, 4)]
    terms = [passed(adversary, decoder, pictures[cut], weights[cut])[2] for cut in cuts]
    assert torch.count_nonzero(torch.cat(terms)) == 0  # it has no say before it was weighed
    adversary.step(0, 1.0)

    drawn = decoder(pictures[:3])
    wanted = []
    for loss in ((drawn - pictures[:3]).abs().mean(), -other(drawn).mean()):
        decoder.zero_grad()
        loss.backward(retain_graph=True)
        assert decoder.last.weight.grad is not None
        wanted.append(float(decoder.last.weight.grad.norm()))
    scale = wanted[0] / (wanted[1] + 1e-4)
    assert float(adversary.scale) == pytest.approx(scale, rel=1e-4)
    _, _, term = passed(adversary, decoder, pictures, weights)
    fooled = -adversary.network(decoder(pictures)).flatten(1).mean(dim=1)
    torch.testing.assert_close(term, 0.5 * scale * fooled, rtol=1e-4, atol=1e-6)


def test_neither_trains_the_other() -> None:
    adversary, decoder, pictures, weights = parts()
    adversary.scale.fill_(1.0)
    _, _, term = passed(adversary, decoder, pictures, weights)
    assert decoder.first.weight.grad is None
    told = [p.grad.clone() for p in adversary.network.parameters() if p.grad is not None]
    (term * weights).sum().backward()
    assert decoder.first.weight.grad is not None
    for before, parameter in zip(told, adversary.network.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)

    alone = copy.deepcopy(adversary.network)
    alone.zero_grad()
    with torch.no_grad():
        drawn = decoder(pictures[:3])
    discriminator_loss(alone(pictures[:3]), alone(drawn), "hinge").sum().backward()
    for mine, parameter in zip(told, alone.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)


def test_it_learns_to_tell_and_the_decoder_to_fool_it() -> None:
    adversary, decoder, pictures, weights = parts(SMALL.model_copy(update={"lr": 2e-3}))
    grey = pictures * 0 + 0.5
    for step in range(25):
        passed(adversary, decoder, pictures, weights)
        adversary.step(step, 1.0)
    with torch.no_grad():
        real, fake = adversary.network(pictures), adversary.network(decoder(pictures))
    assert float(real.mean()) > float(fake.mean()) + 1
    assert adversary.engine.updates() == 25
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(40):
        _, _, term = passed(adversary, decoder, pictures, weights)
        optimizer.zero_grad()
        (term * weights).sum().backward()
        optimizer.step()
        adversary.forget()
    with torch.no_grad():
        assert float(adversary.network(decoder(pictures)).mean()) > float(fake.mean()) + 1
        assert torch.isfinite(adversary.network(grey)).all()


def test_a_loss_that_is_no_number_makes_the_term_none_and_is_forgotten() -> None:
    adversary, decoder, pictures, weights = parts()
    before = adversary.state()
    broken = pictures.clone()
    broken[0] = float("inf")
    _, _, term = passed(adversary, decoder, broken, weights)
    assert not bool(term.isfinite().any())
    adversary.forget()
    assert adversary.step(0, 1.0) == {}
    after = adversary.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_its_whole_state_comes_back() -> None:
    adversary, decoder, pictures, weights = parts()
    for step in range(3):
        passed(adversary, decoder, pictures, weights)
        adversary.step(step, 1.0)
    state = adversary.state()
    again, *_ = parts(SMALL.model_copy(update={"start": 2}))
    assert not again.active
    again.load(state)
    assert again.active
    for one in (adversary, again):
        passed(one, decoder, pictures, weights)
        one.step(3, 0.5)
    wanted, found = adversary.state(), again.state()
    assert wanted.keys() == found.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []
    assert {name.split("/")[0] for name in wanted} == {"weight", "exp_avg", "exp_avg_sq", "scale", "counts"}
