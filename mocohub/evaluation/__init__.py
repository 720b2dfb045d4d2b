"""Models judged in named protocols, from images to a report."""
