"""Where rankings come from: the sets that are offered, and one file a source (`file_source`, `simulated_labeler`)."""
