import pytest
import timm
import torch
from torch import nn

from tinydet.reparam import compare_outputs, expand, fold
from tinydet.reparam.unfold import calibrate_norms, unfold


def trained(name):
    """A network whose norms have learned something."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def images(count=4):
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("branches", ["", "dbb"])
def test_unfolded_a_network_is_the_same_function(name, branches):
    network, fresh = trained(name), timm.create_model(name, num_classes=5).eval()
    if branches:
        network = expand(network, branches, "3x3").eval()
    folded, _ = fold(network, images(1))
    state, norms = unfold(fresh, folded.state_dict(), images(1))
    assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in fresh.modules())
    fresh.load_state_dict(state)
    assert compare_outputs(network, fresh, [images()]).max_rel < 1e-4


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050"])
def test_calibrated_norms_compute_the_same_with_a_batch_s_statistics(name):
    network = trained(name)
    folded, _ = fold(network, images(1))
    expected = network(images()).detach()
    state, norms = unfold(network, folded.state_dict(), images(1))
    network.load_state_dict(state)

    def in_training():
        for module in network.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        output = network(images()).detach()
        network.eval()
        return output

    scale = expected.abs().max()
    assert (in_training() - expected).abs().max() > 0.1 * scale  # The fault that it prevents.
    network.load_state_dict(state)
    calibrate_norms(network, norms, images())
    assert not network.training
    torch.testing.assert_close(network(images()), expected, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(in_training(), expected, rtol=0, atol=1e-3 * scale)


def test_tensors_of_another_network_are_refused():
    folded, _ = fold(trained("resnet10t"), images(1))
    with pytest.raises(ValueError, match="not of the folded form of this network"):
        unfold(trained("resnet14t"), folded.state_dict(), images(1))


def test_a_network_with_branches_of_its_own_cannot_be_unfolded():
    folded, _ = fold(trained("repvgg_a0"), images(1))
    fresh = timm.create_model("repvgg_a0", num_classes=5).eval()
    with pytest.raises(ValueError, match="has lost layers that training needs"):
        unfold(fresh, folded.state_dict(), images(1))
