"""What is measured: FID, IS, precision and recall, PSNR, SSIM and codebook use."""
