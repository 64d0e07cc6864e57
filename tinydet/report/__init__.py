"""What a run is shown as: drawings of boxes."""
