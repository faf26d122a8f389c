"""The local store: blobs, objects, indexes, METAs, the catalog, gc, fsck, locks."""
