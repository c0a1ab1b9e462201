"""What a run withstands: kills, damages and full disks (`__main__`), and hostile input (`fuzz`)."""
