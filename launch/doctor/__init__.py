"""`baton doctor` looks for what would keep a cluster from serving, before it serves."""
