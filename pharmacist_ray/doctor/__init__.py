"""What this machine and this configuration can run, from arithmetic and a look around, before anything is spent."""
