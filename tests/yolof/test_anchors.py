import torch

from tinydet.yolof.anchors import make_anchors


def test_same_as_reference(reference):
    anchors = make_anchors(10, 13, 32, (32, 64, 128, 256, 512))
    torch.testing.assert_close(anchors, reference["anchors"], rtol=0, atol=0)


def test_other_stride_sides_and_shape_by_hand():
    boxes = [
        [16 * x - side / 2, 16 * y - side / 2, 16 * x + side / 2, 16 * y + side / 2]
        for y in range(2)
        for x in range(3)
        for side in (7, 20.5)
    ]
    anchors = make_anchors(2, 3, 16, (7, 20.5))
    assert anchors.dtype == torch.float32
    torch.testing.assert_close(anchors, torch.tensor(boxes))
