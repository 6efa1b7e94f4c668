"""Large files, written and read without filling memory. Does not know what a tensor means."""
