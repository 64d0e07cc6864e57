"""Is an idea worth it: experiments trained side by side, and a verdict with its uncertainty."""
