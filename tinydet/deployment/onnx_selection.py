"""Selection of detections as an ONNX graph: `tinydet.yolof.decode.postprocess` for any batch.

B images, A anchors, K classes, P = A * K pairs, C candidates, D = max_detections.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto

from tinydet.config import Model

OPSET = 18
IR_VERSION = 10

# Threshold first or candidates first is the same: both take the best scores. Values are named
# `select_*` so that none meets a name of the network's graph.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
selection (float[batch, P] pair_scores, float[batch, A, 4] anchor_boxes)
  => (float[batch, {D}, 4] boxes, float[batch, {D}] scores,
      int64[batch, {D}] labels, int64[batch] count)
  <float select_threshold = {{{threshold}}}, float select_nms_iou = {{{nms_iou}}},
   int64[1] select_candidates = {{{candidates}}}, int64[1] select_detections = {{{D}}},
   int64 select_classes = {{{K}}}, int64[1,{K},1] select_class_ids = {{{class_ids}}},
   int64[1] select_last = {{-1}}, int64[1] select_0 = {{0}}, int64[1] select_1 = {{1}},
   int64[1] select_2 = {{2}}, int64[1] select_4 = {{4}}, int64[2] select_image_and_rank = {{0, 2}},
   float select_zero = {{0.0}}, int64 select_no_label = {{-1}}, int64 select_no_index = {{0}},
   int64[4] select_pad_pairs = {{0, 0, 0, {D}}},
   int64[6] select_pad_boxes = {{0, 0, 0, 0, {D}, 0}}>
{{
  # The best C (anchor, class) pairs of each image.
  select_shape = Shape (pair_scores)
  select_pairs = Gather <axis = 0> (select_shape, select_1)
  select_c = Min (select_candidates, select_pairs)
  select_top, select_top_pairs = TopK <axis = 1> (pair_scores, select_c)
  select_anchors = Div (select_top_pairs, select_classes)
  select_labels = Mod (select_top_pairs, select_classes)
  select_anchor_rows = Unsqueeze (select_anchors, select_last)
  select_boxes = GatherND <batch_dims = 1> (anchor_boxes, select_anchor_rows)
  # An empty box gets score 0, which no threshold lets through.
  select_corner1 = Slice (select_boxes, select_0, select_2, select_2)
  select_corner2 = Slice (select_boxes, select_2, select_4, select_2)
  select_sides = Sub (select_corner2, select_corner1)
  select_smallest = ReduceMin <keepdims = 0> (select_sides, select_last)
  select_solid = Greater (select_smallest, select_zero)
  select_scores = Where (select_solid, select_top, select_zero)
  # NMS class by class: each candidate scores 0 for every class but its own, (B, K, C).
  select_labels_row = Unsqueeze (select_labels, select_1)
  select_own_class = Equal (select_labels_row, select_class_ids)
  select_scores_row = Unsqueeze (select_scores, select_1)
  select_class_scores = Where (select_own_class, select_scores_row, select_zero)
  select_kept = NonMaxSuppression (
    select_boxes, select_class_scores, select_detections, select_nms_iou, select_threshold)
  # (image, class, candidate) rows back into a dense (B, C): kept scores, 0 elsewhere.
  select_kept_at = Gather <axis = 1> (select_kept, select_image_and_rank)
  select_kept_scores = GatherND (select_scores, select_kept_at)
  select_dense_shape = Shape (select_scores)
  select_nothing = ConstantOfShape <value = float[1] {{0.0}}> (select_dense_shape)
  select_dense = ScatterND (select_nothing, select_kept_at, select_kept_scores)
  # The best D of them; padded first, since there may be fewer than D candidates.
  select_padded = Pad (select_dense, select_pad_pairs, select_zero)
  scores, select_order = TopK <axis = 1> (select_padded, select_detections)
  select_found = Greater (scores, select_zero)
  select_padded_labels = Pad (select_labels, select_pad_pairs, select_no_index)
  select_best_labels = GatherElements <axis = 1> (select_padded_labels, select_order)
  labels = Where (select_found, select_best_labels, select_no_label)
  select_padded_boxes = Pad (select_boxes, select_pad_boxes, select_zero)
  select_order_rows = Unsqueeze (select_order, select_last)
  select_best_boxes = GatherND <batch_dims = 1> (select_padded_boxes, select_order_rows)
  select_found_rows = Unsqueeze (select_found, select_last)
  boxes = Where (select_found_rows, select_best_boxes, select_zero)
  select_found_int = Cast <to = 7> (select_found)
  count = ReduceSum <keepdims = 0> (select_found_int, select_1)
}}
"""


def selection_graph(config: Model, num_classes: int) -> ModelProto:
    """Build the graph from scores and clipped boxes to padded detections.

    Inputs are `pair_scores` (B, A * K) after the sigmoid and `anchor_boxes` (B, A, 4) clipped to
    the image; outputs `boxes` (B, D, 4), `scores` (B, D), `labels` (B, D), `count` (B,), padded
    with 0, and -1 for labels.
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
    return onnx.parser.parse_model("\n".join(lines))
