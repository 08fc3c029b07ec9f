"""Where services and stages run: local processes here, cluster jobs beside them."""
