"""Images in, features out: extraction and the folder it writes."""
