def worst_images(evidence, store, confidence, most=8):
    return ()
