"""Selection of detections as an ONNX graph: `tinydet.yolof.decode.postprocess` for batches.

B images, A anchors, K classes, P = A * K pairs, C candidates, D = max_detections.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto

from tinydet.config import Model
from tinydet.deployment.onnx_detector import RAW

OPSET = 18
IR_VERSION = 10

# Thresholding before or after choosing candidates gives the same result, since both take the best
# scores. Values are named `tinydet_*` so that none collides with a name of the network's graph.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
selection (float[batch, P] pair_scores, float[batch, A, 4] anchor_boxes, float[sized, 2] sizes)
  => (float[batch, {D}, 4] boxes, float[batch, {D}] scores,
      int64[batch, {D}] labels, int64[batch] count)
  <float tinydet_threshold = {{{threshold}}}, float tinydet_nms_iou = {{{nms_iou}}},
   int64[1] tinydet_candidates = {{{candidates}}}, int64[1] tinydet_detections = {{{D}}},
   int64 tinydet_classes = {{{K}}}, int64[1,{K},1] tinydet_class_ids = {{{class_ids}}},
   int64[1] tinydet_last = {{-1}}, int64[1] tinydet_0 = {{0}}, int64[1] tinydet_1 = {{1}},
   int64[1] tinydet_2 = {{2}}, int64[1] tinydet_4 = {{4}},
   int64[2] tinydet_image_and_rank = {{0, 2}}, int64[4] tinydet_whwh = {{1, 0, 1, 0}},
   float tinydet_zero = {{0.0}}, int64 tinydet_no_label = {{-1}}, int64 tinydet_no_index = {{0}},
   int64[4] tinydet_pad_pairs = {{0, 0, 0, {D}}},
   int64[6] tinydet_pad_boxes = {{0, 0, 0, 0, {D}, 0}}>
{{
  # The best C (anchor, class) pairs of each image.
  tinydet_shape = Shape (pair_scores)
  tinydet_pairs = Gather <axis = 0> (tinydet_shape, tinydet_1)
  tinydet_c = Min (tinydet_candidates, tinydet_pairs)
  tinydet_top, tinydet_top_pairs = TopK <axis = 1> (pair_scores, tinydet_c)
  tinydet_anchors = Div (tinydet_top_pairs, tinydet_classes)
  tinydet_labels = Mod (tinydet_top_pairs, tinydet_classes)
  tinydet_anchor_rows = Unsqueeze (tinydet_anchors, tinydet_last)
  tinydet_input_boxes = GatherND <batch_dims = 1> (anchor_boxes, tinydet_anchor_rows)
  # Clipped to the image without its padding, where that is known.
  tinydet_limits = Gather <axis = 1> (sizes, tinydet_whwh)
  tinydet_limit_rows = Unsqueeze (tinydet_limits, tinydet_1)
  tinydet_boxes = Min (tinydet_input_boxes, tinydet_limit_rows)
  # An empty box gets score 0, which no threshold lets through.
  tinydet_corner1 = Slice (tinydet_boxes, tinydet_0, tinydet_2, tinydet_2)
  tinydet_corner2 = Slice (tinydet_boxes, tinydet_2, tinydet_4, tinydet_2)
  tinydet_sides = Sub (tinydet_corner2, tinydet_corner1)
  tinydet_smallest = ReduceMin <keepdims = 0> (tinydet_sides, tinydet_last)
  tinydet_solid = Greater (tinydet_smallest, tinydet_zero)
  tinydet_scores = Where (tinydet_solid, tinydet_top, tinydet_zero)
  # NMS class by class: each candidate scores 0 for every class but its own, (B, K, C).
  tinydet_labels_row = Unsqueeze (tinydet_labels, tinydet_1)
  tinydet_own_class = Equal (tinydet_labels_row, tinydet_class_ids)
  tinydet_scores_row = Unsqueeze (tinydet_scores, tinydet_1)
  tinydet_class_scores = Where (tinydet_own_class, tinydet_scores_row, tinydet_zero)
  tinydet_kept = NonMaxSuppression (
    tinydet_boxes, tinydet_class_scores, tinydet_detections, tinydet_nms_iou, tinydet_threshold)
  # (image, class, candidate) rows back into a dense (B, C): kept scores, 0 elsewhere.
  tinydet_kept_at = Gather <axis = 1> (tinydet_kept, tinydet_image_and_rank)
  tinydet_kept_scores = GatherND (tinydet_scores, tinydet_kept_at)
  tinydet_dense_shape = Shape (tinydet_scores)
  tinydet_nothing = ConstantOfShape <value = float[1] {{0.0}}> (tinydet_dense_shape)
  tinydet_dense = ScatterND (tinydet_nothing, tinydet_kept_at, tinydet_kept_scores)
  # The best D of them; padded first, since there may be fewer than D candidates.
  tinydet_padded = Pad (tinydet_dense, tinydet_pad_pairs, tinydet_zero)
  scores, tinydet_order = TopK <axis = 1> (tinydet_padded, tinydet_detections)
  tinydet_found = Greater (scores, tinydet_zero)
  tinydet_padded_labels = Pad (tinydet_labels, tinydet_pad_pairs, tinydet_no_index)
  tinydet_best_labels = GatherElements <axis = 1> (tinydet_padded_labels, tinydet_order)
  labels = Where (tinydet_found, tinydet_best_labels, tinydet_no_label)
  tinydet_padded_boxes = Pad (tinydet_boxes, tinydet_pad_boxes, tinydet_zero)
  tinydet_order_rows = Unsqueeze (tinydet_order, tinydet_last)
  tinydet_best_boxes = GatherND <batch_dims = 1> (tinydet_padded_boxes, tinydet_order_rows)
  tinydet_found_rows = Unsqueeze (tinydet_found, tinydet_last)
  boxes = Where (tinydet_found_rows, tinydet_best_boxes, tinydet_zero)
  tinydet_found_int = Cast <to = 7> (tinydet_found)
  count = ReduceSum <keepdims = 0> (tinydet_found_int, tinydet_1)
}}
"""


def selection_graph(config: Model, num_classes: int) -> ModelProto:
    """Build the graph from scores and clipped boxes to padded detections.

    Inputs are `pair_scores` (B, A * K) after the sigmoid, `anchor_boxes` (B, A, 4) clipped to the
    network input, and the optional `sizes` (B, 2), the images' heights and widths within it;
    outputs are `boxes` (B, D, 4), `scores` (B, D), `labels` (B, D), `count` (B,), padded with 0,
    and -1 for labels.
    """
    text = _GRAPH.format(
        ir_version=IR_VERSION,
        opset=OPSET,
        threshold=f"{max(config.score_threshold, 0.0):.9f}",
        nms_iou=f"{config.nms_iou:.9f}",
        candidates=config.candidates,
        D=config.max_detections,
        K=num_classes,
        class_ids=", ".join(str(k) for k in range(num_classes)),
    )
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    model = onnx.parser.parse_model("\n".join(lines))
    # An input with an initializer is optional.
    anything = np.full((1, 2), np.inf, np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(anything, "sizes"))
    return model


def with_selection(network: ModelProto, config: Model, num_classes: int) -> ModelProto:
    """Return a network that returns `RAW`, followed by the selection of detections.

    Args:
        network: of `tinydet.deployment.onnx.export_network`.
        config: thresholds of the selection.
        num_classes: K.
    """
    selection = selection_graph(config, num_classes)
    model = onnx.compose.merge_models(network, selection, [(name, name) for name in RAW])
    del model.opset_import[1:]  # Merging lists the same opset twice.
    return model
