"""Pictures of stored runs, torch-free: any region of a map, thumbnails, token labels, colour maps, charts."""
