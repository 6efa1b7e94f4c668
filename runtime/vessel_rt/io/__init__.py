"""Files, folders and streams: bounded reads, whole writes, locks, checksums. Does not know what is in a file."""
