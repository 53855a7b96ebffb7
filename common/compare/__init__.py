"""What `sh reproduce.sh` does: rivals, measurements, tables, charts and the report."""
