"""What people look at: pages, plots and pictures of evaluations."""
