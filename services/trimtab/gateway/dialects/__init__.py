"""What other systems speak, one small file each; all of them end in the same two clients as trimtab's own routes."""
