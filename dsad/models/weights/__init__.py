"""Published weights: names, files, the hub, and the way between them and trees."""
