"""Does an idea help? Experiments trained side by side, and a verdict with its uncertainty."""
