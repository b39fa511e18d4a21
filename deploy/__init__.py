"""Checks of what is shipped beside the code: images, compose file and chart."""
