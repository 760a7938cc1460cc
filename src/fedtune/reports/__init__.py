"""Many runs side by side: tables, curves and one page, from their records alone."""
