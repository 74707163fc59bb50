"""wantrain's parts inside other programs' training: each file stands alone and loads what it needs by itself."""
