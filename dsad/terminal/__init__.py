"""What every command shares: flags and config files, progress on the screen."""
