"""Speed, measured: each script times ringflash beside its peers in one process and draws what it found."""
