"""What the commands do, one module each, imported once their config has been checked."""
