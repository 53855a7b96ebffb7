"""What `run.sh` and the command `ertacache` do."""
