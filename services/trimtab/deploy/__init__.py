"""What `trimtab deploy` does: manifests from k8s/, what a cluster lacks for them, and bringing them there."""
